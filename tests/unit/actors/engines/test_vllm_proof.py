"""The proof of a swap on modules made as vLLM makes them; vLLM itself is not needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from actors.engines.proof import differing, number_sum
from actors.engines.vllm_proof import KERNEL, LoaderCheck, digests, mark_kernels
from cluster.contracts.errors import Fatal


def packed_layer(weight: Tensor, opaque: bool) -> torch.nn.Module:
    """A layer whose weight went into a kernel: one that hides it, or one that holds a tensor."""
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(weight.clone())
    module.bias = torch.nn.Parameter(torch.ones(3))
    total = number_sum([weight])

    def hiding() -> Callable[[Tensor], Tensor]:
        held = [weight.clone()]  # a list: no tensor to be seen, as with a library's handle
        return lambda x: x @ held[0].T

    def showing() -> Callable[[Tensor], Tensor]:
        packed = weight.clone()
        return lambda x: x @ packed.T

    setattr(module, KERNEL, hiding() if opaque else showing())
    module.weight = torch.nn.Parameter(torch.empty(0))
    mark_kernels([(module, "weight", total), (module, "bias", 0)])
    return module


@pytest.mark.parametrize("opaque", [True, False])
def test_a_kernel_is_told_by_what_it_was_packed_from(opaque: bool) -> None:
    weight = torch.randn(3, 4)
    near = weight.clone()
    near[1, 2] += 1e-7
    first, same, other = (packed_layer(w, opaque) for w in (weight, weight, near))
    noted = digests([("layer", first)])
    assert differing(noted, digests([("layer", same)])) == []
    assert f"layer.{KERNEL}" in differing(noted, digests([("layer", other)]))
    same.bias.data[0] += 2e-7
    assert differing(noted, digests([("layer", same)])) == ["layer.bias"]


def test_a_kernel_that_was_never_marked_proves_nothing() -> None:
    layer = packed_layer(torch.randn(3, 4), opaque=True)
    noted = digests([("layer", layer)])
    setattr(layer, KERNEL, lambda x, held=layer: x)
    assert differing(noted, digests([("layer", layer)])) == [f"layer.{KERNEL}"]


def test_a_loader_that_changes_numbers_once_it_did_not_is_refused() -> None:
    check = LoaderCheck()
    check.compare(5, 5)
    with pytest.raises(Fatal, match="did not load the numbers"):
        check.compare(6, 7)


def test_a_model_whose_numbers_its_loader_changes_is_said_to_be_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    check = LoaderCheck()
    check.compare(5, 6)
    check.compare(7, 9)
    assert check.keeps_numbers is False
    assert caplog.text.count("proven to be those it loaded") == 1
