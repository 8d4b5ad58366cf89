"""Figures of completions that monitors look at."""

from __future__ import annotations

import random

import numpy as np
import pytest

from cluster.contracts.config.safety import refuses
from learner.rl.metrics import repeated_sequences
from learner.rl.rollouts import Ragged


def ragged(*rows: list[int]) -> Ragged:
    offsets = np.cumsum([0, *map(len, rows)])
    values = np.array([token for row in rows for token in row], dtype=np.int32)
    return Ragged(values, offsets)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1, 2, 3, 4, 5]], (0, 2)),
        ([[7] * 10], (6, 7)),
        ([[1, 2, 3, 4, 1, 2, 3, 4]], (1, 5)),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], (0, 2)),  # in two completions: no repetition
        ([[1, 2], [3, 4], [5]], (0, 0)),
        ([[1, 2, 3, 4], [], [9], [5, 5, 5, 5, 5]], (1, 3)),
    ],
)
def test_repeated_sequences(rows: list[list[int]], expected: tuple[int, int]) -> None:
    assert repeated_sequences(ragged(*rows)) == expected


def test_repeated_sequences_are_those_that_a_plain_count_finds() -> None:
    noise = random.Random(0)
    for _ in range(30):
        rows = [[noise.randrange(4) for _ in range(noise.randrange(40))] for _ in range(8)]
        seen = [[tuple(row[i : i + 4]) for i in range(len(row) - 3)] for row in rows]
        expected = sum(len(found) - len(set(found)) for found in seen), sum(map(len, seen))
        assert repeated_sequences(ragged(*rows)) == expected


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, no.", True),
        ("Sure, here it is.", False),
        (None, False),
        ("I cannot do it", True),
    ],
)
def test_refusals(text: str | None, refused: bool) -> None:
    assert refuses(text) is refused
