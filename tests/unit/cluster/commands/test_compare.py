"""`accord compare` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.commands.compare import compare
from cluster.contracts.errors import UserError


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    for name, lr in (("a", 1), ("b", 2)):
        path = tmp_path / name
        path.mkdir()
        (path / "config.toml").write_text(f"lr = {lr}")
        (path / "manifest.json").write_text('{"command": "sft", "status": "finished"}')
        rows = [{"step": s, "train/loss": lr / s} for s in (1, 2, 3)]
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [tmp_path / "a", tmp_path / "b"]


def test_two_runs_are_shown_side_by_side(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    page = runs[0].parent / "page.html"
    compare(runs, out=page)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"A: {runs[0]} (sft, finished)"
    words = [line.split() for line in lines]
    assert ["lr", "1", "2"] in words
    assert ["training", "loss", "0.3333", "0.6667", "0.3333", "(3)", "0.6667", "(3)"] in words
    assert "  B █▄▂  0.6667 to 2" in lines
    assert page.is_file()


def test_json_holds_the_same(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    compare(runs, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == {"lr": ["1", "2"]}
    assert found["metrics"]["train/loss"]["best"] == [[1 / 3, 3], [2 / 3, 3]]


def test_wrong_runs_and_a_wrong_page_are_named(runs: list[Path]) -> None:
    with pytest.raises(UserError, match="cannot compare 1 run"):
        compare(runs[:1])
    with pytest.raises(UserError, match="not a run directory"):
        compare([runs[0], runs[0].parent])
    with pytest.raises(UserError, match="cannot be written"):
        compare(runs, out=runs[0] / "no" / "page.html")
