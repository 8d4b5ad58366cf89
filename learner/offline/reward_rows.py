"""What `accord reward-model` trains on: completions of one prompt in order, as token ids."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cluster.contracts.config.offline import RewardModelConfig
from cluster.contracts.errors import UserError
from learner.compute.microbatches import TokenRow
from learner.offline.datasets import Ranking
from learner.offline.setup import answered


@dataclass(frozen=True, slots=True)
class RewardRow:
    """ranked: the best first; of a tie two, neither better. weight: in the loss. heads: how often
    the row is in each head's bootstrap; () for once in all. slice: a value of `slice_key`."""

    ranked: tuple[TokenRow, ...]
    margin: float = 0.0
    tie: bool = False
    weight: float = 1.0
    slice: str = ""
    heads: tuple[float, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.ranked) * self.longest

    @property
    def longest(self) -> int:
        return max(len(side) for side in self.ranked)

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Places (better, worse) of all pairs that the row orders."""
        return iter(()) if self.tie else itertools.combinations(range(len(self.ranked)), 2)


def encode(tokenizer: Any, row: Ranking, config: RewardModelConfig) -> RewardRow:
    """Raises UserError for a row that the config's keys have no use for, BadRow for a bad one."""
    shape = row.shape
    _check(row, config)
    weight = shape.weight if config.use_weight else 1.0
    return RewardRow(
        ranked=tuple(answered(tokenizer, row.messages, text) for text in shape.ranked),
        margin=(shape.margin or 0.0) if config.use_margin else 0.0,
        tie=shape.tie,
        weight=weight * config.annotator_weights.get(shape.annotator, 1.0),
        slice=str(row.columns.get(config.slice_key, "")) if config.slice_key else "",
    )


def _check(row: Ranking, config: RewardModelConfig) -> None:
    shape = row.shape
    if shape.tie and not config.tie_threshold:
        raise UserError(
            "is a tie, but tie_threshold is 0",
            where=row.where,
            fix="set tie_threshold (0.5 is a start), or leave ties out of the file",
        )
    if config.use_margin and not shape.tie and shape.margin is None:
        raise UserError(
            "has no margin, but use_margin is set",
            where=row.where,
            fix="give every pair a number `margin`, or set use_margin=false",
        )
    if config.label_smoothing and len(shape.ranked) > 2:
        raise UserError(
            "is a ranking, but label_smoothing is for pairs",
            where=row.where,
            fix="give pairs, or set label_smoothing=0",
        )
    if config.slice_key and row.columns.get(config.slice_key) is None:
        raise UserError(
            f"has no column {config.slice_key!r}, which slice_key names",
            where=row.where,
            fix="give every row a value, or leave slice_key out",
        )


def bootstrap(rows: Sequence[RewardRow], heads: int, seed: int) -> list[RewardRow]:
    """The rows with how often each is drawn into the sample of each head: Poisson numbers of mean 1
    (Oza & Russell 2001). So heads on one trunk learn from different data and can disagree."""
    if heads == 1:
        return list(rows)
    counts = np.random.default_rng([seed, heads]).poisson(1.0, size=(len(rows), heads))
    return [
        replace(row, heads=tuple(map(float, drawn)))
        for row, drawn in zip(rows, counts, strict=True)
    ]
