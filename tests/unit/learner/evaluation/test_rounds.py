"""The report over a pipeline's rounds, from the files that a pipeline leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from learner.evaluation.report import write_report
from learner.evaluation.rounds import read_rounds
from learner.evaluation.run_files import RunFiles
from learner.evaluation.samples import Sample, write_samples


def rate(value: float) -> dict[str, float]:
    return {"win_rate": value, "ci_low": value - 0.05, "ci_high": value + 0.05}


def stage(number: int, name: str, **keys: Any) -> dict[str, Any]:
    given = {"round": number, "name": name, "status": "finished", "run": None, "seconds": 12.5}
    return {**given, "detail": {}, "parents": [], "outputs": {}, **keys}


def of_round(n: int) -> list[dict[str, Any]]:
    evaluated = {**rate(0.5 + 0.1 * n), "against_before": rate(0.55), "against_start": rate(0.6)}
    return [
        stage(n, "sample", outputs={f"round-{n}/completions": "ab" * 32}, parents=["sft"]),
        stage(n, "label", detail={"by": "simulated", "labels": 40, "annotators": 5, "alpha": 0.31}),
        stage(n, "gate", outputs={f"round-{n}/labels": "cd" * 32}),
        stage(n, "policy", run=f"round-{n}/policy", parents=[f"round-{n}/labels"]),
        stage(n, "evaluate", run=f"round-{n}/evaluation", detail=evaluated),
        stage(n, "promote", detail={"promoted": n == 1, "reason": f"because of {n}"}),
    ]


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    folder = tmp_path / "rounds"
    rows = [stage(0, "sft", run="sft"), *of_round(1), *of_round(2)]
    for n in (1, 2):
        samples = [
            Sample(prompt=p, before="old", after=f"new {n}", before_score=0.0, after_score=1.0)
            for p in ("first", "second")
        ]
        (folder / f"round-{n}" / "evaluation").mkdir(parents=True)
        write_samples(folder / f"round-{n}" / "evaluation" / "samples.jsonl", samples)
        (folder / f"round-{n}" / "labels").mkdir()
        alpha = {"krippendorff_alpha": 0.42, "krippendorff_alpha_interval": [0.4, 0.44]}
        manifest = {"quality": {"agreement": alpha}}
        (folder / f"round-{n}" / "labels" / "snapshot.json").write_text(json.dumps(manifest))
    (folder / "sft").mkdir()
    (folder / "sft" / "manifest.json").write_text(json.dumps({"command": "sft"}))
    (folder / "manifest.json").write_text(json.dumps({"command": "pipeline", "status": "finished"}))
    (folder / "pipeline.json").write_text(json.dumps({"rounds": 2, "stages": rows}))
    return folder


def test_what_the_report_tells_of_rounds(pipeline: Path) -> None:
    found = read_rounds(RunFiles(pipeline))
    assert found is not None
    first, second = found.table.rows
    assert first[:6] == ("1", "40", "5", "0.31", "0.420 (0.4 to 0.44)", "60.0% (55.0% to 65.0%)")
    assert (first[7], second[7]) == ("yes", "no")
    start, before = found.rates
    assert (start.label, start.rounds, before.rate) == ("against the start", (1, 2), (0.55, 0.55))
    assert [prompt.prompt for prompt in found.samples] == ["first", "second"]
    assert [which for which, _, _ in found.samples[0].completions] == [
        "before round 1", "round 1", "round 2"
    ]  # fmt: skip


def test_the_page_of_a_pipeline_links_the_reports_of_its_stages(pipeline: Path) -> None:
    html = write_report(pipeline).read_text("utf-8")
    assert (pipeline / "sft" / "report.html").is_file()
    assert '<a href="sft/report.html">sft</a>' in html
    assert "Win rate by round" in html
    assert "against the round before: round 1 55.0%, round 2 55.0%" in html
    assert "pipeline.json" not in json.loads((pipeline / "summary.json").read_text())["missing"]


@pytest.mark.parametrize(
    "damage",
    [
        "", "[]", "{}", '{"stages": 3}', '{"stages": [1, {}, {"round": "x", "detail": 4}]}',
        '{"stages": [{"round": 1, "name": "evaluate", "run": "../..", "detail": '
        '{"against_start": 1, "win_rate": "x"}, "outputs": [1], "parents": {"a": 1}}]}',
        '{"stages": [{"round": 1, "name": "<b>", "run": "/etc", "seconds": "x", "status": []}]}',
    ],
)  # fmt: skip
def test_a_damaged_record_never_stops_the_report(tmp_path: Path, damage: str) -> None:
    (tmp_path / "pipeline.json").write_text(damage)
    html = write_report(tmp_path).read_text("utf-8")
    assert 'id="rounds"' in html
    assert "<b>" not in html
    assert 'href="/etc' not in html
