"""Line charts of a live page: where their lines, ticks and labels stand. Pure.

A template writes them as SVG, coloured by the style sheet, so no text here becomes markup. Reports
are drawn by matplotlib instead, which takes too long for a page that is made anew at every step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from learner.evaluation.lines import Line, describe, smooth, thin, window

WIDTH, HEIGHT = 360, 180
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 8, 34  # room for ticks and the label of the x axis


@dataclass(frozen=True, slots=True)
class Drawn:
    """One line. ``points``: for an SVG polyline; ``trend``: the same, smoothed, of a long line."""

    label: str
    points: str
    trend: str
    last: float


@dataclass(frozen=True, slots=True)
class Tick:
    place: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """``x_range`` and ``y_range``: the values at the ends of the axes."""

    name: str
    title: str
    alt: str
    x_label: str
    lines: tuple[Drawn, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def line_chart(name: str, title: str, lines: Sequence[Line], x_label: str) -> Chart | None:
    """``name`` is unique in the page. None without a point."""
    shown = [line for line in lines if len(line.x)]
    if not shown:
        return None
    x_range = _range([value for line in shown for value in line.x], padded=False)
    y_range = _range([value for line in shown for value in line.y], padded=True)
    return Chart(
        name=name,
        title=title,
        alt=describe(shown),
        x_label=x_label,
        lines=tuple(_drawn(line, x_range, y_range) for line in shown),
        x_ticks=tuple(Tick(_x(at, x_range), number_text(at)) for at in ticks(*x_range, 5)),
        y_ticks=tuple(Tick(_y(at, y_range), number_text(at)) for at in ticks(*y_range, 4)),
        x_range=x_range,
        y_range=y_range,
    )


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers within the range: one, two or five times a power of ten apart."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)][: most + 2]


def number_text(value: float) -> str:
    """12, 0.25, 1.2k, 3M: short enough for an axis."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if limit <= abs(value) < 1e12:
            return f"{value / (1e3 if unit == 'k' else limit):.4g}{unit}"
    return f"{value:.4g}"


def _range(values: Sequence[float], *, padded: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        return (low - margin, high + margin) if padded else (low, low + 1.0)
    margin = (high - low) * 0.05 if padded else 0.0
    return low - margin, high + margin


def _drawn(line: Line, x_range: tuple[float, float], y_range: tuple[float, float]) -> Drawn:
    width = window(len(line.y))
    trend = _points(line.x, smooth(line.y, width), x_range, y_range) if width > 1 else ""
    return Drawn(line.label, _points(line.x, line.y, x_range, y_range), trend, line.y[-1])


def _points(
    x: Sequence[float],
    y: Sequence[float],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
) -> str:
    xs, ys = thin(x, y)
    pairs = zip(xs, ys, strict=True)
    return " ".join(f"{_x(a, x_range):.1f},{_y(b, y_range):.1f}" for a, b in pairs)


def _x(value: float, limits: tuple[float, float]) -> float:
    return LEFT + _share(value, limits) * (WIDTH - LEFT - RIGHT)


def _y(value: float, limits: tuple[float, float]) -> float:
    return HEIGHT - BOTTOM - _share(value, limits) * (HEIGHT - TOP - BOTTOM)


def _share(value: float, limits: tuple[float, float]) -> float:
    """Also where the range is wider than the largest number."""
    width = limits[1] / 2 - limits[0] / 2
    return min(1.0, max(0.0, (value / 2 - limits[0] / 2) / width)) if width > 0 else 0.0
