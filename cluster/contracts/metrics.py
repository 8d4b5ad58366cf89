"""Metric values that merge exactly, whichever way the work was split.

A function that measures returns ``Metric`` values; they ride with the data and are merged once, by
the one who writes them. Means carry their weight, so a mean of means is never taken.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["mean", "sum", "max", "min", "last"]


@dataclass(frozen=True, slots=True)
class Metric:
    """``total`` is the weighted sum for "mean", else the value; ``weight`` is for "mean" only."""

    name: str
    kind: Kind
    total: float
    weight: float = 1.0

    @property
    def value(self) -> float:
        if self.kind == "mean":
            return self.total / self.weight if self.weight else float("nan")
        return self.total


def mean(name: str, total: float, weight: float) -> Metric:
    """A mean given as its sum and its count (or sum of weights)."""
    return Metric(name, "mean", float(total), float(weight))


def last(name: str, value: float) -> Metric:
    return Metric(name, "last", float(value))


def total(name: str, value: float) -> Metric:
    return Metric(name, "sum", float(value))


def largest(name: str, value: float) -> Metric:
    return Metric(name, "max", float(value))


def smallest(name: str, value: float) -> Metric:
    return Metric(name, "min", float(value))


def merge(metrics: Iterable[Metric]) -> dict[str, Metric]:
    """Merge values of the same name; raises ValueError when two of one name differ in kind."""
    merged: dict[str, Metric] = {}
    for metric in metrics:
        before = merged.get(metric.name)
        merged[metric.name] = metric if before is None else _merge_two(before, metric)
    return merged


def _merge_two(a: Metric, b: Metric) -> Metric:
    if a.kind != b.kind:
        raise ValueError(f"metric {a.name!r} is both {a.kind} and {b.kind}")
    match a.kind:
        case "mean":
            return Metric(a.name, "mean", a.total + b.total, a.weight + b.weight)
        case "sum":
            return Metric(a.name, "sum", a.total + b.total)
        case "max":
            return Metric(a.name, "max", max(a.total, b.total))
        case "min":
            return Metric(a.name, "min", min(a.total, b.total))
        case "last":
            return b


def values(metrics: Iterable[Metric]) -> dict[str, float]:
    """Merged plain numbers by name, for sinks."""
    return {name: metric.value for name, metric in merge(metrics).items()}
