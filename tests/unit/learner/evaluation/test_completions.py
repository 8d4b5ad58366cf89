"""Completions of a training run in its report."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from cluster.contracts.records import Completion, Prompt, Rollout, RolloutGroup, Score, VersionSpan
from cluster.contracts.rollout_table import to_table
from learner.evaluation.completions import of_training
from learner.evaluation.report import write_report
from learner.evaluation.run_files import RunFiles

TURNS = (
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "<b>How long?</b>"},
)


def write_step(run: Path, index: int, *scores: float) -> Path:
    (run / "rollouts").mkdir(exist_ok=True)
    prompt = Prompt(id="p", messages=TURNS, token_ids=(1,))
    samples = []
    for place, value in enumerate(scores):
        completion = Completion(
            token_ids=[5],
            logprobs=[-1.0],
            versions=(VersionSpan(version=0, start=0, end=1),),
            finish_reason="length",
        )
        rollout = Rollout(
            prompt=prompt, completion=completion, sample_index=place, text=f"text {value}"
        )
        parts = {"a": value, "b": 0.0}
        samples.append((rollout, Score(value=value, parts=parts, scorer_version="v")))
    path = run / "rollouts" / f"step-{index:06d}.parquet"
    pq.write_table(to_table([RolloutGroup(group_id=index, samples=tuple(samples))]), path)
    return path


def test_first_last_best_and_worst_with_scores_and_speakers(tmp_path: Path) -> None:
    write_step(tmp_path, 0, 0.25)
    write_step(tmp_path, 3, 5.0, 9.5)
    write_step(tmp_path, 8, 1.0, 3.5, -2.5)
    found = of_training(RunFiles(tmp_path))
    assert [shown.reason for shown in found] == [
        *("first step (1), random", "last step (9), random"),
        *("last step (9), best", "last step (9), worst"),
    ]
    assert [shown.score for shown in (found[0], *found[2:])] == [0.25, 3.5, -2.5]
    assert found[0].prompt == "user: Hello\n\nassistant: Yes?\n\nuser: <b>How long?</b>"
    html = write_report(tmp_path).read_text("utf-8")
    assert "last step (9), worst" in html
    assert "score -2.5 (a -2.5, b 0)" in html
    assert "cut at rollout.max_tokens" in html
    assert "user: &lt;b&gt;How long?&lt;/b&gt;" in html


def test_a_damaged_file_is_named_and_a_run_without_any_shows_none(tmp_path: Path) -> None:
    assert of_training(RunFiles(tmp_path)) == []
    write_step(tmp_path, 0, 0.25).write_bytes(b"PAR1")
    files = RunFiles(tmp_path)
    assert of_training(files) == []
    assert "is damaged" in files.notes["rollouts"][0]
    assert "is damaged" in write_report(tmp_path).read_text("utf-8")
