"""What `accord dpo` trains on: pairs, or single completions, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learner.compute.microbatches import TokenRow
from learner.offline.datasets import Preference
from learner.offline.setup import answered


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """The two sides of a pair, or one side alone.

    ref_chosen, ref_rejected: the reference's log-probability of each, summed over its tokens.
    mismatched: the prompt with a completion of another prompt, for KTO's estimate of the KL.
    """

    chosen: TokenRow | None
    rejected: TokenRow | None
    ref_chosen: float = 0.0
    ref_rejected: float = 0.0
    mismatched: TokenRow | None = None
    ref_mismatched: float = 0.0

    @property
    def sides(self) -> list[TokenRow]:
        return [side for side in (self.chosen, self.rejected) if side is not None]

    @property
    def longest(self) -> int:
        return max(len(side) for side in self.sides)

    def __len__(self) -> int:
        return len(self.sides) * self.longest

    @property
    def weight(self) -> float:
        return 1.0


@dataclass(frozen=True, slots=True)
class JudgedRow(PreferenceRow):
    """A row of KTO, whose loss is per completion."""

    @property
    def weight(self) -> float:
        return float(len(self.sides))


def encode(tokenizer: Any, row: Preference) -> PreferenceRow:
    chosen, rejected = _encoded_sides(tokenizer, row)
    return PreferenceRow(chosen, rejected)


def encode_judged(tokenizer: Any, row: Preference) -> JudgedRow:
    chosen, rejected = _encoded_sides(tokenizer, row)
    return JudgedRow(chosen, rejected)


def _encoded_sides(tokenizer: Any, row: Preference) -> tuple[TokenRow | None, TokenRow | None]:
    chosen, rejected = (
        None if text is None else answered(tokenizer, row.messages, text)
        for text in (row.chosen, row.rejected)
    )
    return chosen, rejected


def mismatch(rows: Sequence[PreferenceRow], seed: int, max_tokens: int) -> list[PreferenceRow]:
    """Each row with the completion of the next row of another prompt, in a seeded order.

    A row that would be longer than `max_tokens` is cut there. Rows of one prompt only stay without.
    """
    order = np.random.default_rng(seed).permutation(len(rows))
    prompts = [prompt_of(row.sides[0]).tobytes() for row in rows]
    done = list(rows)
    for place, index in enumerate(order):
        later = (order[(place + step) % len(rows)] for step in range(1, len(rows)))
        other = next((i for i in later if prompts[i] != prompts[index]), None)
        if other is None:
            continue
        side = rows[other].sides[place % len(rows[other].sides)]
        own = prompt_of(rows[index].sides[0])
        ids = np.concatenate([own, side.input_ids[len(prompt_of(side)) :]])[:max_tokens]
        mask = np.arange(len(ids)) >= len(own)
        done[index] = replace(rows[index], mismatched=TokenRow(input_ids=ids, loss_mask=mask))
    return done


def prompt_of(row: TokenRow) -> NDArray[np.int32]:
    """Ids before the completion."""
    return row.input_ids[: int(row.loss_mask.argmax())]
