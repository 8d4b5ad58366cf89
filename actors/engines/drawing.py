"""One token per row from its logits, and its log-probability, in as few passes as that takes."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def draw(
    logits: torch.Tensor,
    generators: Mapping[int, torch.Generator] | None = None,
    greedy: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample from softmax(logits) by inverting its cumulative distribution.

    logits: [rows, vocabulary] float32, after temperature and limits. generators: row -> its own
    source of randomness; the other rows use torch's default one. One uniform number of 53 bits per
    row is drawn, so nothing is drawn for tokens that are not sampled. greedy: bool [rows], which
    rows take their most probable token instead.

    Returns token ids (int64) and their natural-log probabilities (float32), both [rows].
    """
    chances = logits.softmax(dim=-1)
    # In float64, so that the sum over a large vocabulary does not swallow small probabilities.
    upto = chances.cumsum(dim=-1, dtype=torch.float64)
    points = torch.rand(len(logits), 1, dtype=torch.float64)
    for row, generator in (generators or {}).items():
        points[row] = torch.rand(1, dtype=torch.float64, generator=generator)
    points *= upto[:, -1:]
    # The first token whose sum exceeds the point: never one of probability 0.
    tokens = torch.searchsorted(upto, points, right=True).clamp_(max=logits.shape[-1] - 1)
    if greedy is not None:
        tokens = torch.where(greedy[:, None], chances.argmax(dim=-1, keepdim=True), tokens)
    return tokens[:, 0], chances.gather(1, tokens)[:, 0].log_()
