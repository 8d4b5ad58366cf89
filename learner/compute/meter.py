"""Numbers measured during an update, kept on the device and read once.

Each `float(tensor)` makes a CPU wait for the GPU; a step of many microbatches would wait hundreds
of times.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cluster.contracts.metrics import Kind, Metric


class Meter:
    """Adds up means (as sums and weights) and largest values by name."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[Kind, Tensor, Tensor]] = {}

    def mean(self, name: str, total: Tensor, weight: Tensor | float) -> None:
        """A mean given as its 0-d sum and its count (or sum of weights)."""
        total = total.detach().double()
        heavy = torch.as_tensor(weight, dtype=torch.float64, device=total.device).detach()
        if name in self._found:
            _, before, before_weight = self._found[name]
            total, heavy = before + total, before_weight + heavy
        self._found[name] = ("mean", total, heavy)

    def largest(self, name: str, value: Tensor) -> None:
        value = value.detach().double()
        if name in self._found:
            value = torch.maximum(self._found[name][1], value)
        self._found[name] = ("max", value, torch.ones_like(value))

    def parts(self, parts: Mapping[str, tuple[Tensor, Tensor]], prefix: str) -> None:
        """(sum, count) tensors of `learner.algorithms` as means."""
        for name, (total, count) in parts.items():
            self.mean(prefix + name, total, count)

    def read(self) -> list[Metric]:
        """Everything as plain numbers: one transfer from the device."""
        if not self._found:
            return []
        rows = torch.stack([torch.stack((a, b)) for _, a, b in self._found.values()]).tolist()
        return [
            Metric(name, kind, *row)
            for (name, (kind, _, _)), row in zip(self._found.items(), rows, strict=True)
        ]
