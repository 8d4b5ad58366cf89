"""The whole loss of a step does not depend on how its batch is split, padded or ordered."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

import learner.algorithms.masked as masked_module
from learner.algorithms.importance import importance_weights
from learner.algorithms.kl import k3_plus
from learner.algorithms.loss_terms import MetricParts
from learner.algorithms.masked import Aggregation, aggregate
from learner.algorithms.policy_loss import POLICY_LOSSES
from learner.algorithms.value_loss import clipped_value_loss

LENGTHS = (7, 1, 4, 6, 3, 5)
Rows = dict[str, Tensor]


def _batch() -> Rows:
    generator = torch.Generator().manual_seed(11)
    shape = (len(LENGTHS), max(LENGTHS))
    mask = torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]
    mask[0, 2] = mask[3, 1] = False

    def noise(scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    prox = -noise(1.0).abs()
    return {
        "features": noise(1.0),
        "mask": mask,
        "prox": prox,
        "behaviour": prox + noise(0.3),
        "reference": prox + noise(0.2),
        "advantages": noise(1.0),
        "old_values": noise(0.5),
        "returns": noise(1.0),
    }


def _step(
    name: str, mode: Aggregation, parts: list[Rows]
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Loss, gradient and merged metrics of one step over these microbatches of the whole batch."""
    parameters = torch.tensor([0.2, -0.1, 0.3], dtype=torch.float64, requires_grad=True)
    denominator = float(_batch()["mask"].sum()) if mode == "token-mean" else float(len(LENGTHS))
    total = torch.zeros((), dtype=torch.float64)
    merged: dict[str, Tensor] = {}
    for rows in parts:
        mask = rows["mask"]
        logp = rows["prox"] + parameters[0] * rows["features"]
        values = parameters[1] * rows["features"] + parameters[2]
        policy = POLICY_LOSSES[name](logp, rows["prox"], rows["advantages"], mask)
        weights, metrics = importance_weights(
            rows["prox"], rows["behaviour"], mask, "sequence-mask", cap=1.5, floor=0.5
        )
        value = clipped_value_loss(values, rows["old_values"], rows["returns"], mask)
        losses = policy.losses * weights + 0.1 * value.losses
        losses = losses + 0.05 * k3_plus(logp, rows["reference"])
        loss = aggregate(losses, mask, mode, denominator, max_length=16)
        loss.backward()
        total = total + loss.detach()
        _merge(merged, policy.metrics | metrics)
    assert parameters.grad is not None
    return total, parameters.grad, {k: (v[0] / v[1]).item() for k, v in merged.items()}


def _merge(into: dict[str, Tensor], metrics: MetricParts) -> None:
    for name, parts in metrics.items():
        into[name] = into.get(name, torch.zeros(2, dtype=torch.float64)) + torch.stack(parts)


def _split(rows: Rows, sizes: list[int]) -> list[Rows]:
    """Consecutive rows, each microbatch cut to its own longest response."""
    parts, start = [], 0
    for size in sizes:
        width = max(LENGTHS[start : start + size])
        parts.append({k: v[start : start + size, :width] for k, v in rows.items()})
        start += size
    return parts


def _widen(rows: Rows) -> Rows:
    padded = {
        k: torch.nn.functional.pad(v, (0, 9), value=5.0) for k, v in rows.items() if k != "mask"
    }
    return padded | {"mask": torch.nn.functional.pad(rows["mask"], (0, 9))}


def _reorder(rows: Rows) -> Rows:
    return {k: v[torch.tensor([3, 5, 0, 2, 4, 1])] for k, v in rows.items()}


def _with_empty_microbatch(rows: Rows) -> list[Rows]:
    empty = {k: torch.zeros_like(v[:2]) for k, v in rows.items()}
    return [rows, empty]


CHANGES: dict[str, Callable[[Rows], list[Rows]]] = {
    "one row each": lambda rows: _split(rows, [1] * 6),
    "uneven split": lambda rows: _split(rows, [3, 1, 2]),
    "wider padding": lambda rows: [_widen(rows)],
    "other order": lambda rows: [_reorder(rows)],
    "empty microbatch": _with_empty_microbatch,
}


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("mode", get_args(Aggregation))
@pytest.mark.parametrize("name", list(POLICY_LOSSES))
def test_loss_gradient_and_metrics_stay_the_same(name: str, mode: Aggregation, change: str) -> None:
    loss, gradient, metrics = _step(name, mode, [_batch()])
    assert gradient.abs().min() > 1e-4
    other_loss, other_gradient, other_metrics = _step(name, mode, CHANGES[change](_batch()))
    torch.testing.assert_close(other_loss, loss, atol=1e-12, rtol=0)
    torch.testing.assert_close(other_gradient, gradient, atol=1e-12, rtol=0)
    assert other_metrics == pytest.approx(metrics, abs=1e-12)


def test_a_local_denominator_would_not_be_invariant() -> None:
    """The test above can fail: means of microbatch means are another number."""
    rows = _batch()
    whole = aggregate(rows["returns"], rows["mask"], "token-mean", float(rows["mask"].sum()))
    local = [
        aggregate(part["returns"], part["mask"], "token-mean", float(part["mask"].sum()))
        for part in _split(rows, [3, 1, 2])
    ]
    assert abs(sum(local, torch.zeros(())) / 3 - whole) > 1e-3


def test_the_package_imports_nothing_but_torch_and_itself() -> None:
    assert masked_module.__file__ is not None
    allowed = {"torch", "learner", "__future__", "math", "typing", "dataclasses", "collections"}
    sources = sorted(Path(masked_module.__file__).parent.glob("*.py"))
    assert len(sources) >= 9
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in allowed, (source.name, name)
                assert not name.startswith("torch.distributed"), source.name
                if name.startswith("learner"):
                    assert name.startswith("learner.algorithms."), (source.name, name)
