"""The part of the vocabulary from which each token was sampled, applied to a learner's logits.

An engine that samples with top-k, top-p, min-p, allowed or banned tokens renormalises over the
tokens that are left. A learner that normalises over the whole vocabulary instead computes another
probability, off by the mass that was left out, and its gradient pushes on tokens that could not
have been sampled. So the sets travel with the tokens, and current, old and reference policy alike
are normalised over them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenSets:
    """Sets of token ids, and which one belongs to each of N tokens.

    set_of: int64 [N], index of a token's set, -1 for the whole vocabulary. keeps: bool [S], the set
    lists the tokens that could be sampled; False: those that could not. Set s is
    ids[offsets[s] : offsets[s + 1]]; ids: int64 [M], offsets: int64 [S + 1].
    """

    set_of: Tensor
    keeps: Tensor
    offsets: Tensor
    ids: Tensor

    def forbid(self, logits: Tensor, rows: slice = slice(None), start: int = 0) -> Tensor:
        """`logits` [n, V] of the tokens `rows`, -inf in place where a token could not be sampled.

        start: the logits are those of the token ids from here on.

        The memory it takes is n * V bytes and what the n sets hold. Not for logits that autograd
        still needs as they are.
        """
        return logits.masked_fill_(self.forbidden(rows, logits.shape[-1], start), -torch.inf)

    def forbidden(self, rows: slice, vocabulary: int, start: int = 0) -> Tensor:
        """bool [n, V]: the tokens from id `start` on that could not be sampled."""
        sets = self.set_of[rows]
        device = sets.device
        some = sets >= 0
        known = sets.clamp(min=0)
        lengths = (self.offsets[known + 1] - self.offsets[known]).where(some, 0)
        # One (token, id) pair for each listed id; `within` counts them from 0 in each set.
        token = torch.arange(len(sets), device=device).repeat_interleave(lengths)
        first = (lengths.cumsum(0) - lengths)[token]
        within = torch.arange(len(token), device=device) - first
        listed = torch.zeros(len(sets), vocabulary, dtype=torch.bool, device=device)
        ids = self.ids[self.offsets[known][token] + within] - start
        if start > 0 or (len(ids) and int(ids.max()) >= vocabulary):
            here = (ids >= 0) & (ids < vocabulary)
            token, ids = token[here], ids[here]
        listed[token, ids] = True
        return listed ^ (self.keeps[known] & some)[:, None]
