"""Which tokens may be sampled next, the same for every engine, and the record of it.

All that limits sampling is applied here, to logits that are divided by the temperature already, so
that both engines mean the same by it and the learner can normalise over exactly the same tokens
(`records.TokenSets`). In this order: allowed and banned tokens, no end before `min_tokens`, the
`top_k` most probable, of those the most probable that make up `top_p`, of those the ones at least
`min_p` times as probable as the most probable one.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from actors.settings import EngineSettings
from cluster.contracts.errors import UserError
from cluster.contracts.records import TokenSets

Kept: TypeAlias = "array[int]"
"""int32: the ids that one token was sampled from."""


@dataclass(slots=True)
class Drawn:
    """What was sampled for one request so far, in 4-byte numbers. kept: what `TokenLimits.apply`
    returned for each token."""

    ids: array[int] = field(default_factory=lambda: array("i"))
    logprobs: array[float] = field(default_factory=lambda: array("f"))
    kept: list[Kept] = field(default_factory=list)


class TokenLimits:
    """The limits of an engine's settings, for a vocabulary of `size` logits.

    Raises UserError for a token outside the vocabulary, and where no token would be left.
    """

    def __init__(self, settings: EngineSettings, size: int) -> None:
        self._size = size
        self._top_k = min(settings.top_k or size, size)
        self._top_p, self._min_p = settings.top_p, settings.min_p
        self._allowed, self._banned = settings.allowed_tokens, settings.banned_tokens
        self._stops = settings.stop_token_ids
        self._min_tokens = settings.min_tokens if self._stops else 0
        self._record = settings.record_token_sets
        self.vary = settings.top_k > 0 or settings.top_p < 1 or settings.min_p > 0
        self.records_each_token = self.vary and self._record
        self.any = settings.limits_tokens  # without a limit nothing is applied, nothing recorded
        self._check()
        self._forbidden = self._fixed_mask()

    def _check(self) -> None:
        for name, ids in (("allowed_tokens", self._allowed), ("banned_tokens", self._banned)):
            outside = [token for token in ids if not 0 <= token < self._size]
            if outside:
                raise UserError(
                    f"token {outside[0]} is outside the vocabulary of {self._size}",
                    where=f"rollout.{name}",
                    fix="use token ids of the model's own tokenizer",
                )
        left = set(self._allowed or range(self._size)) - set(self._banned)
        if not (left - set(self._stops) if self._min_tokens else left):
            raise UserError(
                "no token is left to sample",
                where="rollout.allowed_tokens, rollout.banned_tokens",
                fix="allow a token that is neither banned nor an end token",
            )

    def _fixed_mask(self) -> torch.Tensor | None:
        """bool [vocabulary], True where no token may ever be sampled; None: anywhere."""
        if not (self._allowed or self._banned):
            return None
        mask = torch.full((self._size,), bool(self._allowed))
        mask[list(self._allowed)] = False
        mask[list(self._banned)] = True
        return mask

    def apply(self, logits: torch.Tensor, places: Sequence[int]) -> list[Kept] | None:
        """Put -inf in place wherever a token may not be sampled.

        logits: [rows, vocabulary] float32, after the temperature. places: of each row, how many
        tokens its completion has so far. Returns the kept ids of each row where they vary from
        token to token and are recorded, else None.
        """
        if self._forbidden is not None:
            if self._forbidden.device != logits.device:
                self._forbidden = self._forbidden.to(logits.device)
            logits.masked_fill_(self._forbidden, -torch.inf)
        early = [row for row, place in enumerate(places) if place < self._min_tokens]
        if early:
            logits[torch.tensor(early)[:, None], torch.tensor(self._stops)] = -torch.inf
        return self._truncate(logits) if self.vary else None

    def _truncate(self, logits: torch.Tensor) -> list[Kept] | None:
        values, ids = logits.topk(self._top_k, dim=-1)  # sorted, the most probable first
        keep = values > -torch.inf
        if self._top_p < 1:
            chances = values.softmax(dim=-1)
            # What comes before a token, so that the one that reaches top_p is kept as well.
            keep &= chances.cumsum(dim=-1) - chances < self._top_p
        if self._min_p > 0:
            keep &= values >= values[:, :1] + math.log(self._min_p)
        logits.fill_(-torch.inf).scatter_(1, ids, values.masked_fill(~keep, -torch.inf))
        if not self.records_each_token:
            return None
        counts = keep.sum(dim=-1).tolist()
        listed = ids[keep].to("cpu", torch.int32).split(counts)
        return [array("i", part.numpy().tobytes()) for part in listed]

    def sets(self, tokens: int, kept: Sequence[Kept]) -> TokenSets | None:
        """What a completion of `tokens` tokens was sampled from; None: the whole vocabulary.

        kept: what `apply` returned for each of them, where the limits vary.
        """
        if not (self.any and self._record):
            return None
        if self.vary:
            ids = array("i")
            for part in kept:
                ids.extend(part)
            return TokenSets(ends=range(1, tokens + 1), counts=[len(k) for k in kept], ids=ids)
        early = min(self._min_tokens, tokens)
        ends, counts, ids = array("i"), array("i"), array("i")
        for end, stops in ((early, self._stops), (tokens, ())):
            if end > (ends[-1] if ends else 0):
                count, listed = self._fixed_set(stops)
                ends.append(end)
                counts.append(count)
                ids.extend(listed)
        return TokenSets(ends=ends, counts=counts, ids=ids)

    def _fixed_set(self, stops: Sequence[int]) -> tuple[int, list[int]]:
        """(signed count, ids) of what may be sampled without `stops`, see `records.TokenSets`."""
        banned = set(self._banned) | set(stops)
        if self._allowed:
            left = sorted(set(self._allowed) - banned)
            return len(left), left
        return -len(banned), sorted(banned)
