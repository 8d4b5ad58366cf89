"""One optimiser step over microbatches, shared by PPO and by the offline loop.

Each microbatch is a callable that runs forward and returns a loss already divided by the GLOBAL
denominator, so that gradients add up to those of the whole batch however it was split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cluster.contracts.errors import Fatal
from cluster.contracts.metrics import Metric, mean, merge
from learner.compute.mesh import ALONE, Mesh
from learner.compute.optimizer import global_norm
from learner.compute.sharding import by_mesh, local, reduce_gradients, summed_already

MAX_SKIPS_IN_A_ROW = 3

MicrobatchLoss = Callable[[], tuple[Tensor, list[Metric]]]
"""Forward and loss of one microbatch -> (0-d loss with gradient, metrics)."""


@dataclass(slots=True)
class SkipCounter:
    """Steps left out because a number was not finite. One for each optimiser; kept by its owner."""

    total: int = 0
    in_a_row: int = 0

    def skipped(self, reason: str) -> None:
        """Count one. Raises Fatal at the third in a row: the weights or the data are broken."""
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row >= MAX_SKIPS_IN_A_ROW:
            raise Fatal(
                f"{self.in_a_row} optimiser steps in a row were not finite (last: {reason}). "
                "Lower the learning rate or look at the data of these steps. None of these steps "
                "was applied to the weights"
            )


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """grad_norm: L2 norm before clipping (NaN when skipped). metrics: merged over microbatches;
    those of a skipped step are left out. skipped: why nothing was updated, or None."""

    loss: float
    grad_norm: float
    metrics: tuple[Metric, ...]
    skipped: str | None


def optimiser_step(
    optimizer: torch.optim.Optimizer,
    params: Iterable[nn.Parameter],
    microbatches: Iterable[MicrobatchLoss],
    max_grad_norm: float,
    skips: SkipCounter,
    mesh: Mesh = ALONE,
    reduced_once: Sequence[nn.Module | None] = (),
    on_gradients: Callable[[], None] = lambda: None,
) -> StepOutcome:
    """Accumulate gradients of all microbatches, clip to `max_grad_norm`, update once.

    A loss or gradient that is not finite leaves weights and optimiser state untouched and counts in
    `skips`, which raises Fatal at the third in a row. Gradients are freed on return.
    With several ranks each gives its own microbatches; loss and gradients are their sums, so that
    all ranks do, or leave out, the same step. Ranks of one replica (`mesh`) know the same loss, and
    each has its part of the gradients. reduced_once: sharded modules whose gradients are summed
    over ranks with the last microbatch only. on_gradients: called when the last backward pass has
    ended. Raises ValueError if there is no microbatch.
    """
    trainable = [p for p in params if p.requires_grad]
    optimizer.zero_grad(set_to_none=True)
    try:
        total, metrics = _accumulate(microbatches, reduced_once)
        on_gradients()
        grads = [p.grad for p in trainable if p.grad is not None]
        mesh.data.sum_([total])
        mesh.shards.sum_([local(grad) for grad in grads if not summed_already(grad)])
        # Read together: on a GPU this is the step's one wait.
        loss, norm = torch.stack((total, global_norm(grads).to(total))).tolist()
        problem = _problem(loss, norm)
        if problem is not None:
            skips.skipped(problem)
            return StepOutcome(loss, math.nan, (), problem)
        if norm > max_grad_norm:
            for alike in by_mesh(grads):
                torch._foreach_mul_(alike, max_grad_norm / (norm + 1e-6))
        optimizer.step()
        skips.in_a_row = 0
        return StepOutcome(loss, norm, tuple(metrics), None)
    finally:
        optimizer.zero_grad(set_to_none=True)


def _accumulate(
    microbatches: Iterable[MicrobatchLoss], reduced_once: Sequence[nn.Module | None]
) -> tuple[Tensor, list[Metric]]:
    """(0-d float64 sum of the losses, merged metrics); gradients are in the parameters."""
    total, metrics = None, list[Metric]()
    waiting = iter(microbatches)
    following = next(waiting, None)
    while (run := following) is not None:
        following = next(waiting, None)
        reduce_gradients(reduced_once, now=following is None)
        loss, measured = run()
        loss.backward()
        value = loss.detach().double()
        total = value if total is None else total + value
        metrics += measured
    if total is None:
        raise ValueError("an optimiser step needs at least one microbatch")
    return total, list(merge(metrics).values())


def _problem(loss: float, norm: float) -> str | None:
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    return None if math.isfinite(norm) else f"the gradient norm is {norm}"


def metrics_of(parts: Mapping[str, tuple[Tensor, Tensor]], prefix: str = "") -> list[Metric]:
    """(sum, count) tensors of `learner.algorithms` as means that merge; `prefix` before names."""
    return [
        mean(prefix + name, float(total), float(count)) for name, (total, count) in parts.items()
    ]
