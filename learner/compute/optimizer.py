"""The optimiser, its schedules, and the type a forward pass computes in."""

from __future__ import annotations

import ctypes
import gc
import math
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from learner.compute.lean_adamw import LeanAdamW
from learner.compute.ranks import whole
from learner.compute.sharding import by_mesh

Schedule = Literal["constant", "linear", "cosine"]


def make_optimizer(
    params: Iterable[nn.Parameter],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    *,
    eight_bits: bool = False,
    on_host: bool = False,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019). Matrices decay; norms and biases never do.

    Fused, with moments in float32 on the parameters' device, unless they are to be in `eight_bits`
    or `on_host` (see `LeanAdamW`). Each group remembers `initial_lr`, which `set_lr` scales. A
    parameter given twice (tied) counts once. Raises ValueError when nothing is trainable.
    """
    unique = {id(p): p for p in params if p.requires_grad}
    matrices = [p for p in unique.values() if p.ndim >= 2]
    others = [p for p in unique.values() if p.ndim < 2]
    if not unique:
        raise ValueError("no trainable parameters")
    groups = [
        {"params": alike, "lr": lr, "initial_lr": lr, "weight_decay": decay}
        for group, decay in ((matrices, weight_decay), (others, 0.0))
        for alike in by_mesh(group)  # one fused operation takes no others together
    ]
    if eight_bits or on_host:
        return LeanAdamW(groups, lr, betas, eps, eight_bits=eight_bits, on_host=on_host)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group's rate to factor * initial_lr; returns the first group's rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])


def lr_factor(schedule: Schedule, step: float, total: float, warmup: float) -> float:
    """Factor in (0, 1] on the learning rate at 0-based `step` of `total`.

    Rises linearly over `warmup` steps ((step + 1) / warmup), then stays (constant) or falls towards
    0 at `total` (linear, or half a cosine: Loshchilov & Hutter 2017). Past `total` it is that of
    the last step. Raises ValueError for an unknown schedule.
    """
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    progress = (min(step, total - 1) - warmup) / max(total - warmup, 1.0)
    progress = min(max(progress, 0.0), 1.0)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ValueError(f"unknown schedule {schedule!r}; known: constant, linear, cosine")


def compute_in(
    dtype: str, device: torch.device | str, *, cached: bool | None = None
) -> AbstractContextManager[object]:
    """Autocast to bfloat16 for dtype "bfloat16", nothing for "float32" (ModelConfig.dtype).

    cached: keep what weights were cast to until the end; None: as in the context around this one.
    """
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, cache_enabled=cached)


def global_norm(grads: Iterable[Tensor]) -> Tensor:
    """0-d L2 norm over all tensors; not finite if any of their elements is not. Of sharded ones it
    is that of the whole, and every rank has to ask for it."""
    norms = [whole(torch.nn.utils.get_total_norm(alike)) for alike in by_mesh(grads)]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def release_memory() -> None:
    """Give what training used back to the system: glibc keeps freed memory, a gigabyte and more
    after a training run, and other processes of the machine could use it."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
