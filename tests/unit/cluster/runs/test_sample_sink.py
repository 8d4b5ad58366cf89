"""`logging.samples_every`: completions on the console while a run trains."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.contracts.config.base import LoggingConfig
from cluster.contracts.records import Completion, Prompt, Rollout, RolloutGroup, Score, VersionSpan
from cluster.contracts.rollout_table import to_table
from cluster.runs.console import Reporter
from cluster.runs.sample_sink import SampleSink


def write_step(run_dir: Path, step: int, scores: list[float]) -> None:
    prompt = Prompt(
        id="p", messages=({"role": "user", "content": "Q"},), token_ids=(1,), metadata={}
    )
    completion = Completion(
        token_ids=[5, 6],
        logprobs=[-1.0, -1.0],
        versions=(VersionSpan(version=0, start=0, end=2),),
        finish_reason="stop",
    )
    pairs = [
        (
            Rollout(prompt=prompt, completion=completion, sample_index=at, text=f"A{at}\x1b[2J"),
            Score(value=score, parts={}, scorer_version="v"),
        )
        for at, score in enumerate(scores)
    ]
    folder = run_dir / "rollouts"
    folder.mkdir(exist_ok=True)
    table = to_table([RolloutGroup(group_id=0, samples=tuple(pairs))])
    pq.write_table(table, folder / f"step-{step - 1:06d}.parquet")


def sink(run_dir: Path, every: int, quiet: bool = False, **more: bool) -> SampleSink:
    return SampleSink(LoggingConfig(samples_every=every, **more), run_dir, Reporter(quiet=quiet))


def test_every_nth_step_is_shown_once_its_file_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = sink(tmp_path, every=2)
    for step in (1, 2):
        table.write(step, {})
    assert capsys.readouterr().err == ""  # the file of step 2 is not written yet
    write_step(tmp_path, 1, [9.0])
    write_step(tmp_path, 2, [0.5, -1.0, 2.0, 0.25])
    table.write(3, {})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (f"step 2, 3 of 4 completions (in full: accord samples {tmp_path} --step 2)")
    assert [line.split()[:2] for line in lines[2:4]] == [["best", "+2.000"], ["worst", "-1.000"]]
    assert lines[4].split()[0] == "random"
    assert "\x1b" not in "".join(lines)
    table.write(4, {})
    write_step(tmp_path, 4, [1.0])
    table.close()
    assert capsys.readouterr().err.startswith("step 4, 1 of 1 completions")


def test_nothing_is_shown_of_other_steps_or_when_never_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_step(tmp_path, 1, [1.0])
    for every in (0, 2):
        table = sink(tmp_path, every=every)
        table.write(1, {})
        table.close()
    assert capsys.readouterr().err == ""


def test_a_run_that_saves_no_rollouts_says_that_it_can_show_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = sink(tmp_path, every=1, save_rollouts=False)
    table.write(1, {})
    table.close()
    assert "logging.save_rollouts is off" in capsys.readouterr().err
