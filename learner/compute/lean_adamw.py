"""AdamW whose moments take little of the device: rounded to eight bits, or on the host.

Eight bits: block-wise dynamic quantisation (Dettmers et al., "8-bit Optimizers via Block-wise
Quantization", 2021) as torchao stores it, one scale for each 256 numbers; 2 bytes a parameter for
both moments instead of 8. torchao's own `AdamW8bit` compiles its step for each shape and device;
here the same arithmetic runs a piece of a tensor at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from cluster.contracts.errors import UserError
from learner.compute.ranks import is_sharded
from learner.compute.sharding import local, sharded_as

_BLOCK = 256
_LEAST = 4096
"""Smaller tensors (norms, biases) keep float32 moments, as in torchao and bitsandbytes."""
_PIECE = 1 << 24
"""Parameters that are updated at once; so many of each moment are in float32 on the device."""
_MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""Name in the state -> whether it has a sign."""


class LeanAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019), the arithmetic of torch's, on a piece at a time.

    Its state has the names, and the sharding, of `torch.optim.AdamW`'s. eight_bits: moments are
    `torchao.optim.subclass_8bit.OptimState8bit` tensors. on_host: they lie in the host's memory,
    and each piece visits the device.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        *,
        eight_bits: bool = False,
        on_host: bool = False,
    ) -> None:
        self._eight_bits, self._on_host = eight_bits, on_host
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch puts what it loads where the parameter lies.
        for parameter, state in self.state.items():
            for name in _MOMENTS:
                state[name] = self._kept(parameter, state[name], name)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name in _MOMENTS:
                state[name] = self.empty_moment(parameter, name)
        state["step"] += 1
        weights, grads = local(parameter.detach()), local(parameter.grad)  # type: ignore[arg-type]
        kept = [local(state[name]) for name in _MOMENTS]
        for weight, grad, *parts in _pieces(weights, grads, *kept):
            first, second = (in_float32(part).to(weight.device, torch.float32) for part in parts)
            adamw(
                [weight],
                [grad],
                [first],
                [second],
                [],
                # Each piece is a tensor of its own to torch, which counts its step.
                [state["step"] - 1],
                foreach=False,
                amsgrad=False,
                maximize=False,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
            for part, moment in zip(parts, (first, second), strict=True):
                if part is not moment:
                    part.copy_(moment.to(part.device))

    def _kept(self, parameter: Tensor, value: Tensor, name: str) -> Tensor:
        """A moment as the state keeps it."""
        moment = self.empty_moment(parameter, name)
        local(moment).copy_(in_float32(local(value)).to(moment.device))
        return moment

    def empty_moment(self, parameter: Tensor, name: str) -> Tensor:
        """Zeros, as the state keeps the moment of this name: for `stored.restore_moments`, too."""
        part = local(parameter.detach())
        where = torch.device("cpu") if self._on_host else part.device
        if self._eight_bits and part.numel() >= _LEAST and part.numel() % _BLOCK == 0:
            moment = _eight_bit_zeros(part, _MOMENTS[name], where)
        else:
            moment = torch.zeros_like(part, device=where)
        return sharded_as(moment, parameter) if is_sharded(parameter) else moment


def _eight_bit_zeros(like: Tensor, signed: bool, device: torch.device) -> Tensor:
    # It warns of kernels that were made for other machines.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    try:
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as problem:
        raise UserError(
            "an optimiser with eight bits needs torchao, which is not installed",
            where="optimizer",
            fix="uv pip install --no-deps -r requirements/quantised.txt, or set "
            "optimizer = 'adamw'",
        ) from problem

    zeros: Any = OptimState8bit.zeros(like.shape, signed, _BLOCK, device, dtype=like.dtype)
    # torchao's signed codes reach from -0.99 to 1 times a block's largest number. With -1, what
    # was rounded once is not changed by rounding again: a checkpoint may hold float32 numbers.
    if signed:
        zeros.qmap[0] = -1.0
    moment: Tensor = zeros
    return moment


def in_float32(tensor: Tensor) -> Tensor:
    """The numbers of a moment in eight bits (rounding them again gives the same eight bits); any
    other tensor as it is. Of a sharded one: this rank's, sharded."""
    if is_sharded(tensor):
        part = in_float32(local(tensor))
        return tensor if part is local(tensor) else sharded_as(part, tensor)
    exact = getattr(tensor, "dequantize", None)
    return tensor if exact is None or type(tensor) is Tensor else exact()


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Corresponding flat pieces that share the tensors' memory."""
    count = tensors[0].numel()
    if count <= _PIECE or not all(tensor.is_contiguous() for tensor in tensors[:2]):
        yield tensors
        return
    for start in range(0, count, _PIECE):
        yield tuple(_piece(tensor, start, min(start + _PIECE, count)) for tensor in tensors)


def _piece(tensor: Any, start: int, end: int) -> Tensor:
    if type(tensor) is Tensor:
        return tensor.view(-1)[start:end]
    codes, scales = tensor.codes.view(-1)[start:end], tensor.scale[start // _BLOCK : end // _BLOCK]
    piece: Tensor = type(tensor)(codes, scales, tensor.qmap, tensor.signed, tensor.dtype)
    return piece
