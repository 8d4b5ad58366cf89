"""One round by hand: twenty pairs labelled in Chromium within a pipeline, DPO, and a chat."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from reward_service.preferences.store import PreferenceStore

pytestmark = [pytest.mark.browser, pytest.mark.long]

DEADLINE_MS = 300_000
PAIRS = 20
GIVEN = "ACCORD_QUICKSTART"  # a run of `accord quickstart` to use instead of a random model


@pytest.fixture
def start(tmp_path: Path) -> tuple[Path, Path]:
    """(policy, prompts): of a quickstart where one is named, else a model with random weights."""
    if named := os.environ.get(GIVEN):
        run = Path(named)
        return run / "policy", run / "data" / "preference_prompts.jsonl"
    from cluster.quickstart.helpdesk import demonstrations, files, questions
    from learner.models.tiny import fresh_model, train_tokenizer

    policy, prompts = tmp_path / "policy", tmp_path / "prompts.jsonl"
    tokenizer = train_tokenizer(demonstrations.corpus(0, 500), 400, policy)
    fresh_model(tokenizer, policy, hidden=64, layers=2, heads=2, intermediate=64)
    files.write_prompts(prompts, questions.sample_questions(0, 60, "preference"))
    return policy, prompts


def accord(root: Path, *words: str, **how: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "launch.py", *words], cwd=root, stdout=subprocess.PIPE, text=True, **how
    )


def label(page: Any, address: str) -> None:
    """As somebody who prefers the shorter completion, by keyboard."""
    page.goto(address)
    page.get_by_role("button", name="Begin").click()
    page.wait_for_url("**/admin")
    page.get_by_role("link", name="Labelling").click()
    page.wait_for_url("**/welcome")
    page.check("input[name=agree]")
    page.get_by_role("button", name="Begin").click()
    for _ in range(PAIRS):
        page.wait_for_url("**/task/*")
        page.wait_for_selector("html.scripted", state="attached")
        shown = [len(one) for one in page.locator(".completions article").all_inner_texts()]
        page.keyboard.press("1" if shown[0] <= shown[-1] else "7")
        before = page.url
        page.keyboard.press("Enter")
        page.wait_for_url(lambda url, before=before: url != before)
    page.wait_for_selector("text=Nothing is left for you")


def test_twenty_clicks_become_a_policy(
    chromium: Any, tmp_path: Path, repo_root: Path, start: tuple[Path, Path]
) -> None:
    policy, prompts = start
    run = tmp_path / "runs" / "my-clicks"
    words = (
        *("pipeline", "examples/my_clicks.toml", f"run.dir={run.parent}", "label.server.port=0"),
        *(f"model.path={policy}", f"sample.data.prompts={prompts}"),
    )
    process = accord(repo_root, *words)
    assert process.stdout is not None
    context = chromium.new_context()
    context.set_default_timeout(DEADLINE_MS)
    try:
        address = process.stdout.readline().strip()
        assert "/join/" in address
        waiting = psutil.Process(process.pid)
        assert not [one for one in waiting.children(recursive=True) if "ray" in one.name()]
        assert not [one for one in waiting.memory_maps() if "libtorch" in one.path]
        label(context.new_page(), address)
        said, _ = process.communicate(timeout=DEADLINE_MS / 1000)
        assert process.returncode == 0
    finally:
        context.close()
        if process.poll() is None:
            process.terminate()
            process.wait(60)
    assert f"accord chat {run}" in said
    labels = PreferenceStore(run / "preferences.db").judgements()
    assert len({one.item_id for one in labels}) == len(labels) == PAIRS
    stages = json.loads((run / "pipeline.json").read_text())["stages"]
    assert [(row["name"], row["status"]) for row in stages] == [
        (name, "finished") for name in ("sample", "label", "gate", "policy", "promote")
    ]
    chat = accord(repo_root, "chat", str(run), "--no-history", stdin=subprocess.PIPE)
    answer, _ = chat.communicate("how much does the kettle cost?\n", timeout=120)
    assert chat.returncode == 0
    assert answer.strip()
