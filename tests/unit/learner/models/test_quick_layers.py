"""Layers with fewer passes over memory: the same numbers, and float32 is left alone."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from learner.models.quick_layers import Norm, Rotation, use_quick_layers

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
KINDS = {kind.model_type: kind for kind in (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config)}


def wide(*shape: int, seed: int) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.requires_grad_()


def angles(positions: int, size: int) -> tuple[Tensor, Tensor]:
    turns = torch.arange(positions)[:, None] * 0.3 ** torch.arange(size // 2, dtype=torch.float64)
    both = torch.cat((turns, turns), dim=-1)
    return both.cos(), both.sin()


def test_a_norm_and_its_gradient() -> None:
    x, weight = wide(3, 5, 8, seed=1), wide(8, seed=2)
    expected = weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(Norm.apply(x, weight, 1e-3), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *given: Norm.apply(*given, 1e-3), (x, weight))


def test_a_rotation_and_its_gradient() -> None:
    """By hand: one pair of dimensions at an angle of 90 degrees."""
    quarter, whole = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    pair = torch.tensor([[3.0, 5.0]], dtype=torch.float64)
    assert Rotation.apply(pair, quarter, whole).tolist() == [[-5.0, 3.0]]
    x, (cos, sin) = wide(2, 3, 4, 8, seed=3), angles(4, 8)
    assert torch.autograd.gradcheck(lambda given: Rotation.apply(given, cos, sin), (x,))


def states_and_gradient(model: nn.Module, ids: Tensor, *, short: bool) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=short):
        states = model.base_model(input_ids=ids).last_hidden_state.float()  # type: ignore[operator]
        states[..., 0].sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return states.detach(), torch.cat(gradients)


def apart(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("name", KINDS)
def test_a_model_in_bfloat16_is_no_further_from_float32_than_before(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(KINDS[name](**SIZES))
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    kind = type(model.base_model.norm)
    architecture = __import__(kind.__module__, fromlist=[""])
    # As transformers has them, whatever was loaded before in this process; put back afterwards.
    for holder, attribute in ((kind, "forward"), (architecture, "apply_rotary_pos_emb")):
        original = getattr(getattr(holder, attribute), "__wrapped__", getattr(holder, attribute))
        monkeypatch.setattr(holder, attribute, original)
    monkeypatch.delattr(kind, "accord_quick", raising=False)
    ids = torch.randint(0, 32, (3, 40))
    exact = states_and_gradient(model, ids, short=False)
    before = states_and_gradient(model, ids, short=True)

    use_quick_layers(model)
    called = []
    for function in (Norm, Rotation):
        monkeypatch.setattr(function, "apply", counted(function.apply, called, function.__name__))
    again = states_and_gradient(model, ids, short=False)
    assert called == []
    assert all(torch.equal(a, b) for a, b in zip(again, exact, strict=True)), "float32 is as it was"
    now = states_and_gradient(model, ids, short=True)
    assert called.count("Norm") >= 5
    assert called.count("Rotation") == 4
    for quick, slow in zip(apart(now, exact), apart(before, exact), strict=True):
        assert quick <= 1.25 * slow


def counted(function: Any, called: list[str], name: str) -> Any:
    def call(*given: Any) -> Any:
        called.append(name)
        return function(*given)

    return call


def test_a_backward_pass_under_autocast_is_the_same() -> None:
    x, weight = wide(40, 64, seed=4).detach().float(), wide(64, seed=5).detach().float()
    grads = []
    for under in (False, True):
        x.requires_grad_().grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = Norm.apply(x, weight, 1e-6).float().square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=under):
            y.backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_another_architecture_is_left_alone() -> None:
    model = AutoModelForCausalLM.from_config(GemmaConfig(**SIZES))
    use_quick_layers(model)
    assert not hasattr(type(model.base_model.norm), "accord_quick")


def test_models_are_loaded_so(world: ModuleType, tmp_path: Path) -> None:
    from cluster.contracts.config.base import ModelConfig
    from learner.models.load import load_policy

    model = load_policy(ModelConfig(path=str(world.make_model(tmp_path / "model"))))
    assert hasattr(type(model.base_model.norm), "accord_quick")
