"""Log-probabilities and entropies; the chunked head against the plain one, values and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from learner.algorithms.logprobs import (
    chunked_linear_logprobs,
    entropy_from_logits,
    logprobs_from_logits,
)


def _head(
    rows: int = 23, width: int = 6, vocabulary: int = 31, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, width, generator=generator, dtype=dtype)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=dtype)
    bias = torch.randn(vocabulary, generator=generator, dtype=dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    return hidden, weight, bias, labels


def test_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0]])
    labels = torch.tensor([1, 0])
    assert logprobs_from_logits(logits, labels).exp().tolist() == pytest.approx([0.75, 0.5])
    expected = [-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), math.log(2)]
    assert entropy_from_logits(logits).tolist() == pytest.approx(expected)
    # Temperature 1/2 squares the odds: 9 to 1.
    assert logprobs_from_logits(logits, labels, 0.5).exp().tolist() == pytest.approx([0.9, 0.5])
    assert entropy_from_logits(logits, 0.5)[0].item() == pytest.approx(
        -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    )


def test_loops_in_float64_and_any_leading_shape() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels = torch.tensor([[0, 4, 2], [1, 1, 3]])
    logp, entropy = logprobs_from_logits(logits, labels, 0.7), entropy_from_logits(logits, 0.7)
    for b in range(2):
        for t in range(3):
            weights = [math.exp(z / 0.7) for z in logits[b, t].tolist()]
            chances = [w / sum(weights) for w in weights]
            assert logp[b, t].item() == pytest.approx(math.log(chances[int(labels[b, t])]))
            assert entropy[b, t].item() == pytest.approx(-sum(p * math.log(p) for p in chances))


def test_impossible_tokens_do_not_spoil_entropy_or_gradient() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    entropy = entropy_from_logits(logits)
    entropy.sum().backward()
    assert entropy.item() == pytest.approx(math.log(2))
    torch.testing.assert_close(logits.grad, torch.zeros(1, 3), atol=0, rtol=0)


def test_half_precision_logits_are_worked_on_in_float32() -> None:
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(2)).bfloat16()
    labels = torch.tensor([1, 2, 3, 4])
    logp = logprobs_from_logits(logits, labels)
    assert logp.dtype == torch.float32
    assert torch.equal(logp, logprobs_from_logits(logits.float(), labels))
    assert torch.equal(entropy_from_logits(logits), entropy_from_logits(logits.float()))


@pytest.mark.parametrize("chunk", [1, 4, 23, 1024])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_bias", [False, True])
def test_chunked_head_equals_the_plain_head(
    chunk: int, temperature: float, with_bias: bool
) -> None:
    hidden, weight, bias, labels = _head()
    upstream = torch.randn(2, 23, generator=torch.Generator().manual_seed(7))
    results = []
    for chunked in (True, False):
        inputs = [x.clone().requires_grad_() for x in (hidden, weight, bias)[: 2 + with_bias]]
        h, w, b = inputs[0], inputs[1], inputs[2] if with_bias else None
        if chunked:
            logp, entropy = chunked_linear_logprobs(
                h, w, labels, temperature, b, chunk, entropy_gradient=True
            )
        else:
            logits = torch.nn.functional.linear(h, w, b)
            logp = logprobs_from_logits(logits, labels, temperature)
            entropy = entropy_from_logits(logits, temperature)
        (upstream[0] * logp + upstream[1] * entropy).sum().backward()
        results.append([logp, entropy, *(x.grad for x in inputs)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_gradcheck_of_the_chunked_head(entropy_gradient: bool) -> None:
    hidden, weight, bias, labels = _head(5, 3, 7, torch.float64)
    inputs = tuple(x.requires_grad_() for x in (hidden, weight, bias))

    def function(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        logp, entropy = chunked_linear_logprobs(
            h, w, labels, 0.8, b, chunk=2, entropy_gradient=entropy_gradient
        )
        return (logp, entropy) if entropy_gradient else (logp,)

    assert torch.autograd.gradcheck(function, inputs)


def test_entropy_is_a_mere_metric_unless_asked_for() -> None:
    hidden, weight, _, labels = _head()
    logp, entropy = chunked_linear_logprobs(hidden.requires_grad_(), weight, labels)
    assert logp.requires_grad
    assert not entropy.requires_grad
    torch.testing.assert_close(entropy, entropy_from_logits(hidden @ weight.T))


def test_a_frozen_head_and_frozen_states_get_no_gradient() -> None:
    hidden, weight, bias, labels = _head()
    for trained in range(3):
        inputs = [
            x.clone().requires_grad_(i == trained) for i, x in enumerate((hidden, weight, bias))
        ]
        chunked_linear_logprobs(inputs[0], inputs[1], labels, 1.0, inputs[2])[0].sum().backward()
        assert [x.grad is not None for x in inputs] == [i == trained for i in range(3)]


def test_no_rows_give_no_results_and_a_zero_gradient() -> None:
    hidden, weight, _, labels = _head()
    weight.requires_grad_()
    logp, entropy = chunked_linear_logprobs(hidden[:0], weight, labels[:0])
    assert logp.shape == entropy.shape == (0,)
    logp.sum().backward()
    torch.testing.assert_close(weight.grad, torch.zeros_like(weight), atol=0, rtol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_heads_give_float32_results_and_gradients_in_kind(autocast: bool) -> None:
    hidden, weight, bias, labels = _head()
    if not autocast:
        hidden, weight, bias = hidden.bfloat16(), weight.bfloat16(), bias.bfloat16()
    inputs = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logp, _ = chunked_linear_logprobs(inputs[0], inputs[1], labels, 1.0, inputs[2], chunk=4)
    logits = torch.nn.functional.linear(hidden.float(), weight.float(), bias.float())
    torch.testing.assert_close(logp, logprobs_from_logits(logits, labels), atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        gradients = torch.autograd.grad(logp.sum(), inputs)
    assert [x.dtype for x in gradients] == [hidden.dtype] * 3
    plain = [x.detach().float().requires_grad_() for x in inputs]
    logits = torch.nn.functional.linear(plain[0], plain[1], plain[2])
    exact = torch.autograd.grad(logprobs_from_logits(logits, labels).sum(), plain)
    tolerance = 1e-5 if autocast else 2e-2
    for found, expected in zip(gradients, exact, strict=True):
        torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)


class _Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor):
                self.elements = max(self.elements, item.numel())
        return result


def test_all_logits_never_exist_at_once() -> None:
    rows, vocabulary, chunk = 512, 300, 16
    hidden, weight, bias, labels = _head(rows, 4, vocabulary)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    with _Largest() as largest:
        logp, entropy = chunked_linear_logprobs(
            inputs[0], inputs[1], labels, 0.9, inputs[2], chunk, entropy_gradient=True
        )
        (logp.sum() + entropy.sum()).backward()
    assert largest.elements == chunk * vocabulary
    with _Largest() as largest:
        logprobs_from_logits(hidden @ weight.T, labels).sum().backward()
    assert largest.elements == rows * vocabulary


def test_bad_arguments_are_refused() -> None:
    hidden, weight, _, labels = _head()
    with pytest.raises(ValueError, match="temperature"):
        logprobs_from_logits(hidden, labels, 0.0)
    with pytest.raises(ValueError, match="temperature and chunk"):
        chunked_linear_logprobs(hidden, weight, labels, chunk=0)
    with pytest.raises(ValueError, match="one label per row"):
        chunked_linear_logprobs(hidden, weight, labels[:3])
    with pytest.raises(ValueError, match=r"weight \[V, H\]"):
        chunked_linear_logprobs(hidden, weight.T, labels)
