from __future__ import annotations

import copy

import pytest

from cluster.contracts.errors import UserError, WeightMismatch
from cluster.contracts.records import (
    Completion,
    Prompt,
    Rollout,
    RolloutGroup,
    Score,
    VersionSpan,
)
from cluster.contracts.rollout_table import from_table, to_table


def completion(**changes: object) -> Completion:
    fields: dict[str, object] = {
        "token_ids": (5, 6, 7),
        "logprobs": (-0.5, -0.25, -1.0),
        "versions": (
            VersionSpan(version=3, start=0, end=2),
            VersionSpan(version=4, start=2, end=3),
        ),
        "finish_reason": "stop",
    }
    return Completion(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprobs": (-1.0,)}, "3 tokens but 1 log-prob"),
        ({"logprobs": (-1.0, float("nan"), -1.0)}, "not finite"),
        ({"versions": (VersionSpan(version=0, start=0, end=2),)}, "cover 2 of 3"),
        ({"versions": (VersionSpan(version=0, start=1, end=3),)}, "gap or overlap"),
        ({"token_ids": (), "logprobs": (), "versions": ()}, "no tokens"),
    ],
)
def test_a_completion_that_cannot_be_trained_on_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        completion(**changes)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_score_is_finite(number: float) -> None:
    with pytest.raises(ValueError, match="score"):
        Score(value=0.0, parts={"rm": number}, scorer_version="v")


def test_a_group_has_samples_or_a_cause() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        RolloutGroup(group_id=1)


def test_groups_survive_the_table() -> None:
    prompt = Prompt(
        id="p",
        messages=({"role": "user", "content": "hé"},),
        token_ids=(1, 2),
        metadata={"k": [1, "a"]},
    )
    score = Score(value=0.5, parts={"rm": 2.0}, scorer_version="v", vetoes=("rude",))
    rollout = Rollout(prompt=prompt, completion=completion(), sample_index=0, text="ok")
    group = RolloutGroup(group_id=9, samples=((rollout, score),))
    assert from_table(to_table([group])) == [group]


def test_errors_survive_the_way_between_processes() -> None:
    error = copy.copy(UserError("a", where="b", fix="c"))  # by __reduce__, as Ray does
    assert (error.what, error.where, error.fix) == ("a", "b", "c")
    again = copy.copy(WeightMismatch("x"))
    assert (type(again), str(again)) == (WeightMismatch, "x")
