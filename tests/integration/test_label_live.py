"""`accord label --policy RUN` with the real engine: people get pairs that the policy has just
written, and the pages answer while it writes."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from reward_service.preferences.store import PreferenceStore

pytestmark = [pytest.mark.slow, pytest.mark.long]

DEADLINE_S = 280.0


@pytest.mark.timeout(600)
def test_new_pairs_come_from_the_newest_policy(tmp_path: Path, repo_root: Path, world: Any) -> None:
    run = tmp_path / "run"
    shutil.copytree(world.policy, run / "checkpoints" / "step-000003" / "policy")
    store = tmp_path / "preferences.db"
    words = [
        str(store),
        "--policy",
        str(run),
        f"live.prompts={world.prompts}",
        "live.max_tokens=12",
    ]
    process = subprocess.Popen(
        [sys.executable, "launch.py", "label", *words, "live.ahead=1", "server.port=0"],
        cwd=repo_root,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    invitation = process.stdout.readline().strip()
    address = invitation[: invitation.index("join/")]
    slowest = 0.0
    with httpx.Client(timeout=60.0, follow_redirects=True) as client:
        client.post(invitation)
        csrf = re.findall(r'name="csrf" value="(\w+)"', client.get(f"{address}welcome").text)[0]
        client.post(f"{address}welcome", data={"csrf": csrf, "agree": "yes"})
        deadline = time.monotonic() + DEADLINE_S
        while "Nothing is left for you" in (page := client.get(address)).text:
            assert "Live sampling" in page.text
            assert time.monotonic() < deadline, page.text
            slowest = max(slowest, page.elapsed.total_seconds())
            time.sleep(0.5)
        assert "Which completion is better?" in page.text
        form = {"csrf": csrf, "action": "submit", "choice": "first-2"}
        client.post(str(page.url), data=form)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    (judgement,) = PreferenceStore(store).judgements()
    item = PreferenceStore(store).item(judgement.item_id)
    assert item is not None
    assert {one.policy_version for one in item.completions} == {"step 3"}
    assert {one.run for one in item.completions} == {str(run)}
    sys.stdout.write(f"\nthe slowest page while the engine wrote: {slowest:.3f} s\n")
