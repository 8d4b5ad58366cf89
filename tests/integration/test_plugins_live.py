"""`accord train` with the plugin file of docs/extend.md: it reaches every process of a real run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extend.md"


@pytest.mark.slow
def test_a_run_made_of_plugins(world: Any, accord: Any, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    (tmp_path / "my_plugin.py").write_text("\n\n".join(blocks), encoding="utf-8")
    config = world.train_toml(
        tmp_path / "train.toml",
        'type = "length"\ntarget = 4',
        algorithm='advantage = "median"\nloss = "gentle"\nloss_options = { down = 0.3 }',
        weights='transport = "npz"',
    )
    config.write_text('plugins = ["my_plugin.py"]\n' + config.read_text("utf-8"), encoding="utf-8")
    command = accord.run("train", config, timeout_s=180)
    assert command.process.returncode == 0, command.stderr
    run = tmp_path / "runs" / "r"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert rows[-1]["rewards/plugin/mean"] == rows[-1]["rewards/mean"] < 0
    assert rows[-1]["weight_sync/canary_logp_diff"] < 1e-4
    replayed = accord.run("replay", run, "--verify", timeout_s=120)
    assert replayed.process.returncode == 0, replayed.stderr
