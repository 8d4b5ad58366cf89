"""Norms and rotary positions of common decoders with fewer passes over memory.

A learner's step in bfloat16 on a CPU spends as much time between the matrix products as in them.
transformers computes a norm and the rotation of queries and keys with many small operations in
float32, and autocast then rounds each result once for every product that takes it. Here each is one
operation with a backward pass of its own, computed in float32 and rounded once.

Only what autocast computes in bfloat16 on a CPU changes. Everything else, float32 above all, goes
through transformers' own code.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from learner.compute.ranks import is_sharded

T = TypeVar("T")
NORMS = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"})
"""weight * x / sqrt(mean(x^2) + variance_epsilon), in modules whose rotation turns the first half
of a head's dimensions against the second."""
ROTATION = "apply_rotary_pos_emb"
_MARK = "accord_quick"


def use_quick_layers(model: nn.Module) -> None:
    """Let the layers of this model, and of others of its architecture in this process, compute so.
    Without effect on an architecture that is not known here."""
    for kind in {type(module) for module in model.modules()}:
        if kind.__name__ in NORMS and not hasattr(kind, _MARK):
            setattr(kind, _MARK, True)
            architecture = sys.modules[kind.__module__]
            kind.forward = _norm_or(kind.forward)
            setattr(architecture, ROTATION, _rotation_or(getattr(architecture, ROTATION)))


def _norm_or(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if _rounded(hidden_states, self.weight):
            return Norm.apply(hidden_states, self.weight, self.variance_epsilon)
        return original(self, hidden_states)

    return forward


def _rotation_or(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        if not _rounded(q, k):
            return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return Rotation.apply(q, cos, sin), Rotation.apply(k, cos, sin)

    return rotated


def _rounded(*tensors: Tensor) -> bool:
    """Whether these are whole, on a CPU, and autocast rounds them to bfloat16 for products."""
    return (
        torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and all(x.device.type == "cpu" and not is_sharded(x) for x in tensors)
    )


def exactly(function: Callable[..., T]) -> Callable[..., T]:
    """Without autocast, which would round what is computed within, also in a backward pass that is
    run under it."""

    @functools.wraps(function)
    def call(*given: Any) -> T:
        with torch.autocast("cpu", enabled=False):
            return function(*given)

    return call


class Norm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension (Zhang & Sennrich 2019, eq. 4).

    x [..., H] and weight [H] in any float type -> [..., H], computed in float32 at least and
    rounded to bfloat16 (float64 stays, for the test of the gradient).
    """

    @staticmethod
    @exactly
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        size = wide.shape[-1]
        # The norm's square is the sum of squares without a tensor of them.
        total = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = total.div_(size).add_(eps).rsqrt_()
        unit = wide * scale
        ctx.save_for_backward(unit, weight, scale)
        ctx.given = x.dtype
        return (unit * weight).to(_short(unit))

    @staticmethod
    @exactly
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        # y = weight * u, u = x * s: dx = s * (g - u * mean(g * u)), g = weight * dy
        unit, weight, scale = ctx.saved_tensors
        gradient = gradient.to(unit.dtype)
        for_weight = (gradient * unit).flatten(0, -2).sum(0).to(weight.dtype)
        scaled = gradient * weight
        mean = torch.linalg.vecdot(scaled, unit).unsqueeze(-1).div_(unit.shape[-1])
        for_x = scaled.addcmul_(unit, mean, value=-1.0).mul_(scale)
        return for_x.to(ctx.given), for_weight, None


class Rotation(torch.autograd.Function):
    """Rotary positions (Su et al. 2021, eq. 34): dimensions i and i + D/2 of a head are turned
    against each other by the angle of their position.

    x [..., D], cos and sin broadcastable to it, both halves alike -> [..., D], as `Norm` rounds.
    """

    @staticmethod
    @exactly
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.given = x.dtype
        return _turned(x, cos, sin, 1.0).to(_short(x))

    @staticmethod
    @exactly
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, sin, -1.0).to(ctx.given), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    first, second = x[..., :half], x[..., half:]
    turned = torch.empty_like(x, dtype=torch.promote_types(x.dtype, cos.dtype))
    torch.mul(first, cos, out=turned[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=turned[..., half:]).addcmul_(first, sin, value=sign)
    return turned


def _short(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == torch.float64 else torch.bfloat16
