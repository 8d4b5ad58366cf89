"""A model with rounded parameters: the numbers of a rounded model, without a copy of the model."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from learner.models.rounded import decoder_layers, rounded

IDS = torch.tensor([[5, 9, 2, 7, 11, 3]])


@pytest.fixture
def model(tiny_policy: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_policy).eval()


@torch.no_grad()
def expected(model: Any) -> torch.Tensor:
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))
    logits: torch.Tensor = other(IDS).logits
    return logits


@torch.no_grad()
def test_it_computes_what_a_rounded_model_computes_and_is_exact_again(model: Any) -> None:
    exact, wanted = model(IDS).logits, expected(model)
    before = [(id(p), p.clone()) for p in model.parameters()]
    with rounded(model, "bfloat16"):
        assert torch.equal(model(IDS).logits, wanted)
        assert torch.equal(model(IDS).logits, wanted)
    assert not torch.equal(wanted, exact)
    assert torch.equal(model(IDS).logits, exact)
    for (number, saved), parameter in zip(before, model.parameters(), strict=True):
        assert id(parameter) == number
        assert torch.equal(parameter, saved)


@torch.no_grad()
def test_tied_weights_are_rounded_once(model: Any) -> None:
    with rounded(model, "bfloat16"):
        assert model.lm_head.weight is model.model.embed_tokens.weight


@torch.no_grad()
def test_of_the_layers_one_is_rounded_at_a_time(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[torch.nn.Parameter]] = []
    parameter_class = torch.nn.Parameter

    def noted(*args: Any, **keys: Any) -> torch.nn.Parameter:
        parameter = parameter_class(*args, **keys)
        made.append(weakref.ref(parameter))
        return parameter

    monkeypatch.setattr("learner.models.rounded.nn.Parameter", noted)
    alive: list[int] = []

    def look(*_: Any) -> None:
        gc.collect()
        alive.append(sum(p.numel() for one in made if (p := one()) is not None))

    layers = decoder_layers(model)
    rest = {id(p): p.numel() for p in model.parameters()}
    for layer in layers:
        layer.self_attn.register_forward_hook(look)
        for parameter in layer.parameters():
            rest.pop(id(parameter))
    largest = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
    with rounded(model, "bfloat16"):
        model(IDS)
    assert alive == [sum(rest.values()) + largest] * len(layers)
    look()
    assert alive[-1] == 0


@torch.no_grad()
def test_a_failure_in_a_layer_leaves_the_exact_parameters(model: Any) -> None:
    before = list(model.parameters())

    def fails(*_: Any) -> None:
        raise RuntimeError("out of memory")

    hook = decoder_layers(model)[1].mlp.register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="out of memory"), rounded(model, "bfloat16"):
        model(IDS)
    hook.remove()
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    assert not any(layer._forward_hooks for layer in decoder_layers(model))


@pytest.fixture
def eager_backend(model: Any) -> Iterator[Any]:
    model.model.compile(backend="eager", dynamic=True)
    yield model
    torch._dynamo.reset()


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_is_rounded_too(eager_backend: Any) -> None:
    model = eager_backend
    model(IDS)  # compiled now, without any hook
    with rounded(model, "bfloat16"):
        got = model(IDS).logits
    model.model._compiled_call_impl = None
    assert torch.equal(got, expected(model))
