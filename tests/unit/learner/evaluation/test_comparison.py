"""`accord compare`: what differs, last and best numbers, curves with one scale, the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from learner.evaluation.compare_page import write_comparison
from learner.evaluation.comparison import (
    differing_settings,
    metric_rows,
    read_runs,
    sparklines,
)


def make(folder: Path, name: str, config: str, rows: list[dict[str, Any]], **manifest: Any) -> Path:
    path = folder / name
    path.mkdir()
    (path / "config.toml").write_text(config)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {"command": "train", "status": "finished", **manifest}
    (path / "manifest.json").write_text(json.dumps(content))
    return path


def scores(*values: float) -> list[dict[str, Any]]:
    return [{"step": at, "objective/scores": v} for at, v in enumerate(values, start=1)]


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    first = make(
        tmp_path,
        "first",
        '[run]\nname="a"\n[algorithm]\nclip=0.2\nsame=1\n[[reward.sources]]\ntype="rules"',
        [row | {"objective/kl": 0.5} for row in scores(0.0, 3.0, 1.0)],
        versions={"torch": "2"},
    )
    second = make(
        tmp_path,
        "second",
        '[run]\nname="b"\n[algorithm]\nclip=0.3\nsame=1\nnorm=true\n'
        '[[reward.sources]]\ntype="model"',
        scores(1.0, 2.0),
        versions={"torch": "3"},
    )
    return [first, second]


def test_only_what_differs_is_listed_and_absent_keys_are_dashes(pair: list[Path]) -> None:
    assert differing_settings(read_runs(pair)) == [
        ("algorithm.clip", ("0.2", "0.3")),
        ("algorithm.norm", ("-", "true")),
        ("reward.sources.0.type", ("rules", "model")),
        ("version of torch", ("2", "3")),
    ]


def test_best_is_named_with_its_step_where_one_end_is_better(pair: list[Path]) -> None:
    rows = {row.metric: row for row in metric_rows(read_runs(pair))}
    assert list(rows) == ["objective/scores", "objective/kl"]
    assert rows["objective/scores"].last == (1.0, 2.0)
    assert rows["objective/scores"].best == ((3.0, 2), (2.0, 2))
    assert rows["objective/kl"].last == (0.5, None)
    assert rows["objective/kl"].best == (None, None)


def test_the_best_loss_is_the_lowest(tmp_path: Path) -> None:
    path = make(tmp_path, "r", "", [{"step": s, "eval/loss": v} for s, v in ((1, 2.0), (2, 1.0))])
    assert metric_rows(read_runs([path, path]))[0].best[0] == (1.0, 2)


def test_several_reward_sources_are_compared_one_by_one(tmp_path: Path) -> None:
    rows = [
        row | {"rewards/mean": 1, "rewards/a/mean": 1, "rewards/b/mean": 2} for row in scores(3)
    ]
    path = make(tmp_path, "r", "", rows)
    found = [row.title for row in metric_rows(read_runs([path, path]))]
    assert found == ["reward", "reward of source a", "reward of source b"]


def test_sparklines_share_one_scale_of_steps_and_values(tmp_path: Path) -> None:
    low = make(tmp_path, "low", "", scores(0.0, 0.0))
    high = make(tmp_path, "high", "", scores(0.0, 2.0, 4.0, 4.0))
    assert sparklines(read_runs([low, high]), "objective/scores") == ["▁▁", "▁▅██"]
    assert sparklines(read_runs([low, high]), "no/such") == ["", ""]


def test_a_sparkline_of_a_long_run_is_as_wide_as_asked(tmp_path: Path) -> None:
    path = make(tmp_path, "r", "", scores(*range(1000)))
    assert sparklines(read_runs([path]), "objective/scores", width=8) == ["▁▂▃▄▅▆▇█"]


def test_damaged_files_leave_the_rest_comparable(pair: list[Path]) -> None:
    (pair[0] / "config.toml").write_text("[")
    (pair[1] / "metrics.jsonl").unlink()
    runs = read_runs(pair)
    assert ("algorithm.clip", ("-", "0.3")) in differing_settings(runs)
    assert metric_rows(runs)[0].last == (1.0, None)


def test_the_page_shows_both_runs_and_escapes_what_is_theirs(
    pair: list[Path], tmp_path: Path
) -> None:
    config = pair[0] / "config.toml"
    config.write_text('[model]\npath = "<script>alert(1)</script>"')
    page = write_comparison(read_runs(pair), tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("<svg") == 2
    assert "A: 3 points from 0 to 1; B: 2 points from 1 to 2" in page
