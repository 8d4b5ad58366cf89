from __future__ import annotations

import copy
import tracemalloc
from array import array
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pyarrow as pa
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
from cluster.contracts.rollout_table import SCHEMA, from_table, to_table


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


def test_tokens_are_kept_as_four_byte_numbers_whatever_they_came_as() -> None:
    made = completion(token_ids=[5, 6, 7], logprobs=np.float32([-0.5, -0.25, -0.1]))
    assert np.frombuffer(made.token_ids, np.int32).tolist() == [5, 6, 7]
    assert (
        np.frombuffer(made.logprobs, np.float32).tolist()
        == np.float32([-0.5, -0.25, -0.1]).tolist()
    )
    again = ForkingPickler.loads(ForkingPickler.dumps(made))
    assert again == made
    ids = array("i", [5, 6, 7])
    assert completion(token_ids=ids).token_ids is ids  # not copied


def sample(prompt: Prompt, place: int, length: int) -> tuple[Rollout, Score]:
    done = completion(
        token_ids=range(place, place + length),
        logprobs=[-n / 8 for n in range(length)],
        versions=(VersionSpan(version=place, start=0, end=length),),
    )
    rollout = Rollout(prompt=prompt, completion=done, sample_index=place, text=f"t{place}")
    parts = {"a": float(place), "b": -0.25}
    return rollout, Score(value=place / 2, parts=parts, scorer_version="v", vetoes=("x",) * place)


def test_many_groups_survive_the_table_each_with_its_prompt() -> None:
    asked = [
        Prompt(
            id=f"p{n}", messages=({"role": "user", "content": str(n)},), token_ids=(n,) * (n + 1)
        )
        for n in range(3)
    ]
    groups = [
        RolloutGroup(
            group_id=40 - n, samples=tuple(sample(prompt, i, 1 + 3 * i + n) for i in range(2 + n))
        )
        for n, prompt in enumerate(asked)
    ]
    table = to_table(groups)
    assert from_table(table) == sorted(groups, key=lambda group: group.group_id)
    assert table.num_rows == 2 + 3 + 4
    assert table.schema.equals(SCHEMA, check_metadata=True)
    one_at_a_time = pa.concat_tables([to_table([group]) for group in groups])
    assert one_at_a_time.equals(table)
    assert to_table([]).schema.equals(SCHEMA)


def test_no_python_object_is_made_per_token() -> None:
    """Peak of Python's memory while the table is built, against four bytes a number."""
    prompt = Prompt(id="p", messages=(), token_ids=(1,))
    length = 20_000
    groups = [RolloutGroup(group_id=0, samples=tuple(sample(prompt, i, length) for i in range(4)))]
    to_table(groups)
    tracemalloc.start()
    try:
        to_table(groups)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * length * 3 * 4  # one copy of ids and one of log-probabilities, and some room


def test_errors_survive_the_way_between_processes() -> None:
    error = copy.copy(UserError("a", where="b", fix="c"))  # by __reduce__, as Ray does
    assert (error.what, error.where, error.fix) == ("a", "b", "c")
    again = copy.copy(WeightMismatch("x"))
    assert (type(again), str(again)) == (WeightMismatch, "x")
