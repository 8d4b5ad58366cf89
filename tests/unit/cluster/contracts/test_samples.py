"""Completions read back from rollouts/*.parquet."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.contracts.chat import text_prompt
from cluster.contracts.errors import UserError
from cluster.contracts.records import Completion, Prompt, Rollout, RolloutGroup, Score, VersionSpan
from cluster.contracts.rollout_table import to_table
from cluster.contracts.samples import (
    SampleInfo,
    pick,
    prompt_text,
    read_samples,
    sampled_steps,
    unscored,
)


def group(number: int, *scores: float) -> RolloutGroup:
    prompt = Prompt(
        id=f"p{number}",
        messages=({"role": "user", "content": f"question {number}"},),
        token_ids=(1, 2),
        metadata={"answer": number},
    )
    samples = []
    for place, value in enumerate(scores):
        completion = Completion(
            token_ids=[5, 6, 7],
            logprobs=[-1.0, -1.0, -1.0],
            versions=(
                VersionSpan(version=3, start=0, end=2),
                VersionSpan(version=4, start=2, end=3),
            ),
            finish_reason="length",
        )
        rollout = Rollout(
            prompt=prompt, completion=completion, sample_index=place, text=f"text {place}"
        )
        samples.append((rollout, Score(value=value, parts={"a": value}, scorer_version="v")))
    return RolloutGroup(group_id=number, samples=tuple(samples))


def written(folder: Path, index: int, *groups: RolloutGroup) -> Path:
    (folder / "rollouts").mkdir(exist_ok=True)
    path = folder / "rollouts" / f"step-{index:06d}.parquet"
    pq.write_table(to_table(groups), path)
    return path


def test_steps_count_from_one_and_rows_come_by_group_and_sample(tmp_path: Path) -> None:
    written(tmp_path, 4, group(9, 0.5, -0.5), group(8, 1.0, 2.0))
    assert sampled_steps(tmp_path) == [5]
    found = read_samples(tmp_path, 5)
    assert [(s.group, s.sample, s.score) for s in found] == [
        (8, 0, 1.0), (8, 1, 2.0), (9, 0, 0.5), (9, 1, -0.5),
    ]  # fmt: skip
    first = found[0]
    assert (first.step, first.prompt_id, first.completion) == (5, "p8", "text 0")
    assert first.prompt == ({"role": "user", "content": "question 8"},)
    assert (first.parts, first.finish_reason, first.tokens) == ({"a": 1.0}, "length", 3)
    assert (first.versions, first.metadata) == ((3, 4), {"answer": 8})


def test_a_step_that_is_not_there_and_a_damaged_file_are_named(tmp_path: Path) -> None:
    path = written(tmp_path, 0, group(0, 1.0))
    with pytest.raises(UserError, match="no completions of step 2"):
        read_samples(tmp_path, 2)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged"):
        read_samples(tmp_path, 1)


def test_completions_outside_training_have_no_score() -> None:
    rollouts = [
        rollout for rollout, _ in (*group(0, 1.0, 2.0).samples, *group(1, 1.0, 2.0).samples)
    ]
    found = unscored(rollouts, 2)
    assert [(s.group, s.sample, s.score, s.step) for s in found] == [
        (0, 0, None, None), (0, 1, None, None), (1, 0, None, None), (1, 1, None, None),
    ]  # fmt: skip


def test_a_conversation_names_its_speakers_and_plain_text_does_not() -> None:
    turns = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"})
    assert prompt_text(turns) == "system: Be kind.\n\nuser: Hi"
    assert prompt_text(text_prompt("Once upon")) == "Once upon"


def scored(*scores: float | None) -> list[SampleInfo]:
    return [
        SampleInfo(step=1, group=0, sample=at, prompt_id="p", prompt=(), completion="", score=value)
        for at, value in enumerate(scores)
    ]


def test_best_worst_and_random_are_a_third_each_and_none_comes_twice() -> None:
    found = [(reason, s.score) for reason, s in pick(scored(0.0, 3.0, -1.0, 2.0, 1.0), 5, seed=0)]
    assert found[:2] == [("best", 3.0), ("best", 2.0)]
    assert found[2:4] == [("worst", -1.0), ("worst", 0.0)]
    assert found[4] == ("random", 1.0)
    assert [reason for reason, _ in pick(scored(1.0, 2.0), 1, seed=0)] == ["best"]
    assert [reason for reason, _ in pick(scored(1.0, 2.0), 2, seed=0)] == ["best", "worst"]
    assert [s.score for _, s in pick(scored(1.0, 2.0), 9, seed=0)] == [2.0, 1.0]
    assert [reason for reason, _ in pick(scored(None, None, None), 2, seed=0)] == ["random"] * 2
