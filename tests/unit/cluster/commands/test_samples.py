"""`accord samples`: of a training run, of an evaluation, and of a run that has none."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from cluster.commands.samples import samples
from cluster.contracts.errors import UserError


def _sink_tests() -> ModuleType:
    """Where a rollouts file is written for a test."""
    path = Path(__file__).parents[1] / "runs" / "test_sample_sink.py"
    spec = importlib.util.spec_from_file_location("sink_tests", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "manifest.json").write_text('{"command": "train", "status": "running"}')
    return tmp_path


def test_the_newest_step_is_shown_unless_another_is_asked_for(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write = _sink_tests().write_step
    write(run, 1, [5.0, 6.0])
    write(run, 3, [1.0, 2.0, 3.0])
    samples(run, count=2)
    out = capsys.readouterr().out
    assert out.startswith(f"{run}: step 3, 2 of 3 completions, mean score +2.000\n")
    assert "best: score +3.000" in out
    assert "worst: score +1.000" in out
    samples(run, step=1, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert [(row["chosen"], row["score"]) for row in found] == [("best", 6.0), ("worst", 5.0)]
    with pytest.raises(UserError, match="no completions of step 2"):
        samples(run, step=2)


def test_an_evaluation_shows_before_and_after(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "Q", "before": "b", "after": "a", "before_score": 0.0, "after_score": 1.0}
    (run / "samples.jsonl").write_text(json.dumps(row) + "\n")
    (run / "ppo" / "rollouts").mkdir(parents=True)
    samples(run)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"of its training: accord samples {run / 'ppo'}"
    assert lines[2:-2] == [
        "largest improvement:",
        "  prompt", "    Q",
        "  before, score +0.000", "    b",
        "  after, score +1.000", "    a",
    ]  # fmt: skip


def test_a_run_without_completions_says_where_they_come_from(run: Path) -> None:
    with pytest.raises(UserError, match="holds no completions") as caught:
        samples(run)
    assert "logging.save_rollouts" in str(caught.value)
