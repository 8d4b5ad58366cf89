"""Probabilities over the part of the vocabulary a token was sampled from: values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from learner.algorithms.logprobs import (
    chunked_linear_logprobs,
    entropy_from_logits,
    logprobs_from_logits,
)
from learner.algorithms.token_sets import TokenSets
from learner.models.heads import LmHead

VOCABULARY, ROWS = 31, 23
KEPT = [[0, 3, 5, 30], [7], list(range(31))]
DROPPED = [[1], [0, 2, 29]]


def sets_and_mask() -> tuple[TokenSets, Tensor]:
    """Rows take turns: three kept sets, two dropped ones, the whole vocabulary. mask: by hand."""
    table = KEPT + DROPPED
    set_of = torch.tensor([row % 6 if row % 6 < 5 else -1 for row in range(ROWS)])
    lengths = torch.tensor([0, *map(len, table)])
    sets = TokenSets(
        set_of=set_of,
        keeps=torch.tensor([True] * len(KEPT) + [False] * len(DROPPED)),
        offsets=lengths.cumsum(0),
        ids=torch.tensor([token for one in table for token in one]),
    )
    mask = torch.zeros(ROWS, VOCABULARY)
    for row in range(ROWS):
        which = int(set_of[row])
        if 0 <= which < len(KEPT):
            mask[row] = -math.inf
            mask[row, KEPT[which]] = 0.0
        elif which >= 0:
            mask[row, DROPPED[which - len(KEPT)]] = -math.inf
    return sets, mask


def head(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden, weight, bias, labels); each label is in its row's set."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, 6, generator=generator, dtype=dtype)
    weight = torch.randn(VOCABULARY, 6, generator=generator, dtype=dtype)
    bias = torch.randn(VOCABULARY, generator=generator, dtype=dtype)
    _, mask = sets_and_mask()
    labels = torch.multinomial((mask == 0).float(), 1, generator=generator)[:, 0]
    return hidden, weight, bias, labels


def test_by_hand() -> None:
    sets = TokenSets(
        set_of=torch.tensor([0, 1, -1]),
        keeps=torch.tensor([True, False]),
        offsets=torch.tensor([0, 2, 3]),
        ids=torch.tensor([0, 2, 1]),
    )
    whole = sets.forbidden(slice(None), 4)
    assert whole.tolist() == [
        [False, True, False, True],
        [False, True, False, False],
        [False, False, False, False],
    ]
    assert torch.equal(sets.forbidden(slice(1, 3), 4), whole[1:])
    logits = torch.log(torch.tensor([[1.0, 5.0, 3.0, 7.0]]))
    chances = sets.forbid(logits, slice(0, 1)).softmax(-1)
    assert chances.tolist()[0] == pytest.approx([0.25, 0.0, 0.75, 0.0])


@pytest.mark.parametrize("chunk", [1, 4, 23, 1024])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_chunked_head_equals_masked_logits(chunk: int, keep: bool, with_bias: bool) -> None:
    hidden, weight, bias, labels = head()
    sets, mask = sets_and_mask()
    upstream = torch.randn(2, ROWS, generator=torch.Generator().manual_seed(7))
    results = []
    for chunked in (True, False):
        inputs = [x.clone().requires_grad_() for x in (hidden, weight, bias)[: 2 + with_bias]]
        h, w, b = inputs[0], inputs[1], inputs[2] if with_bias else None
        if chunked:
            logp, entropy = chunked_linear_logprobs(
                h, w, labels, 0.7, b, chunk, entropy_gradient=True, keep=keep, sets=sets
            )
        else:
            logits = torch.nn.functional.linear(h, w, b) + mask
            logp = logprobs_from_logits(logits, labels, 0.7)
            entropy = entropy_from_logits(logits, 0.7)
        (upstream[0] * logp + upstream[1] * entropy).sum().backward()
        results.append([logp, entropy, *(x.grad for x in inputs)])
    for found, expected in zip(*results, strict=True):
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_gradcheck() -> None:
    hidden, weight, bias, labels = head(torch.float64)
    sets, _ = sets_and_mask()
    inputs = tuple(x.requires_grad_() for x in (hidden, weight, bias))

    def function(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return chunked_linear_logprobs(
            h, w, labels, 0.8, b, chunk=5, entropy_gradient=True, sets=sets
        )

    assert torch.autograd.gradcheck(function, inputs)


def test_no_gradient_reaches_a_token_that_could_not_be_sampled() -> None:
    hidden, weight, _, _ = head()
    weight.requires_grad_()
    sets = TokenSets(
        set_of=torch.zeros(ROWS, dtype=torch.int64),
        keeps=torch.tensor([True]),
        offsets=torch.tensor([0, 2]),
        ids=torch.tensor([4, 9]),
    )
    labels = torch.full((ROWS,), 4)
    logp, _ = chunked_linear_logprobs(hidden, weight, labels, sets=sets)
    logp.sum().backward()
    moved = (weight.grad.abs().sum(-1) > 0).nonzero()[:, 0].tolist()
    assert moved == [4, 9]


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_every_head_takes_sets(softcap: float | None) -> None:
    hidden, weight, _, labels = head()
    sets, mask = sets_and_mask()
    made = LmHead(weight, None, 1.0, softcap)
    logp, entropy = made.logprobs(hidden, labels, 0.7, entropy=True, sets=sets)
    logits = made.logits(hidden) + mask
    torch.testing.assert_close(logp, logprobs_from_logits(logits, labels, 0.7))
    torch.testing.assert_close(entropy, entropy_from_logits(logits, 0.7))
