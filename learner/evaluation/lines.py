"""Which metrics are drawn, on paper and on live pages, and how they are prepared for it.

Pure: rows in, lines out.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from learner.evaluation.page import visible
from learner.evaluation.run_files import Row, number

STEP = "learner step"
MOST_POINTS = 300
FEWEST_TO_SMOOTH = 20
SOURCE = re.compile(r"rewards/([^/]+)/mean")


@dataclass(frozen=True, slots=True)
class Line:
    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True, slots=True)
class Curve:
    """``metrics``: name -> its legend. A curve whose metrics a run does not have is left out."""

    title: str
    metrics: Mapping[str, str]


CURVES = (
    Curve("Reward, mean score of a step", {"objective/scores": "reward"}),
    Curve("KL to the reference, nats per completion", {"objective/kl": "KL"}),
    Curve("Completion length, tokens", {"completions/mean_length": "mean length"}),
    Curve("Policy entropy, nats per token", {"policy/entropy": "entropy"}),
    Curve(
        "Staleness, learner steps",
        {"async/staleness_mean": "mean", "async/staleness_max": "largest"},
    ),
    Curve(
        "Throughput, tokens per second",
        {"perf/throughput": "trained", "rollout/tokens_per_s": "generated"},
    ),
    Curve("Share of clipped tokens", {"policy/clipfrac": "clipped"}),
    Curve(
        "Groups in which all scores are equal, share",
        {"rewards/zero_std_frac": "no learning signal"},
    ),
    Curve("Explained variance of the value network", {"value/explained_var": "explained"}),
    Curve("Judge's mean score on held-out prompts", {"evaluation/score": "score"}),
    Curve(
        "Win rate against the start, on held-out prompts",
        {
            "evaluation/win_rate": "win rate",
            "evaluation/ci_low": "interval, low",
            "evaluation/ci_high": "interval, high",
        },
    ),
    Curve("Reward model accuracy on held-out pairs", {"rm/accuracy": "accuracy"}),
    Curve("Share of pairs ranked right", {"rewards/accuracies": "ranked right"}),
    Curve("Loss", {"train/loss": "training", "eval/loss": "held out"}),
)


EVALUATED = ("score", "win_rate", "ci_low", "ci_high", "kl", "length")


def with_evaluations(rows: Sequence[Row], evaluations: Sequence[Row]) -> list[Row]:
    """Rows of ``metrics.jsonl`` with those of ``evaluations.jsonl``, each at the step it is of. In
    the metrics they stand at the step at which they were known."""
    found = {
        int(row["step"]): {k: v for k, v in row.items() if not k.startswith("evaluation/")}
        for row in rows
    }
    for evaluation in evaluations:
        if (step := number(evaluation, "step")) is not None:
            values = {f"evaluation/{name}": number(evaluation, name) for name in EVALUATED}
            row = found.setdefault(int(step), {"step": int(step)})
            row |= {name: value for name, value in values.items() if value is not None}
    return [found[step] for step in sorted(found)]


def series(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the rows that have a finite number under ``name``."""
    found = [
        (float(row["step"]), value) for row in rows if (value := number(row, name)) is not None
    ]
    return [step for step, _ in found], [value for _, value in found]


def ends(values: Sequence[float]) -> tuple[float, float] | None:
    """Mean of the first and of the last tenth (1 to 10 values each): one step alone is noise."""
    if not values:
        return None
    n = max(1, min(10, len(values) // 10))
    return statistics.fmean(values[:n]), statistics.fmean(values[-n:])


def curve_lines(rows: Sequence[Row]) -> list[tuple[str, list[Line]]]:
    """(title, lines) of each chart of a run, one for each reward source among them where there are
    several."""
    drawn = []
    for curve in (*CURVES[:1], *_sources(rows), *CURVES[1:]):
        lines = [
            Line(label, *found)
            for name, label in curve.metrics.items()
            if (found := _shown(rows, name))[0]
        ]
        if lines:
            drawn.append((curve.title, lines))
    return drawn


def describe(lines: Sequence[Line]) -> str:
    """For those who cannot see the chart."""
    return "; ".join(_describe(line) for line in lines)


def window(points: int) -> int:
    """Points that ``smooth`` takes the mean of: a tenth of the line, odd; 1 for a short line."""
    return 1 if points < FEWEST_TO_SMOOTH else points // 20 * 2 + 1


def smooth(y: Sequence[float], width: int) -> list[float]:
    """The mean of the up to ``width`` points around each point, fewer at the ends of the line."""
    half = width // 2
    parts = [y[max(0, i - half) : i + half + 1] for i in range(len(y))]
    return [sum(part) / len(part) for part in parts]


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most ``MOST_POINTS`` points: lowest and highest of each stretch, so spikes stay seen."""
    if len(x) <= MOST_POINTS:
        return list(x), list(y)
    keep = {0, len(x) - 1}
    stretches = (MOST_POINTS - 2) // 2
    for k in range(stretches):
        part = range(k * len(x) // stretches, (k + 1) * len(x) // stretches)
        keep |= {min(part, key=lambda i: y[i]), max(part, key=lambda i: y[i])}
    order = sorted(keep)
    return [x[i] for i in order], [y[i] for i in order]


def _sources(rows: Sequence[Row]) -> list[Curve]:
    found = {name: visible(m[1]) for row in rows for name in row if (m := SOURCE.fullmatch(name))}
    if len(found) < 2:
        return []  # one source is the reward itself
    return [
        Curve(f"Reward source {found[name]}, mean", {name: found[name]}) for name in sorted(found)
    ]


def _shown(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    steps, values = series(rows, name)
    if name == "rollout/tokens_per_s":
        # All completions of the last steps are there before these are trained: no slow generation.
        while values and values[-1] == 0:
            steps, values = steps[:-1], values[:-1]
    return steps, values


def _describe(line: Line) -> str:
    return (
        f"{line.label} over {len(line.y)} steps: from {line.y[0]:.4g} to {line.y[-1]:.4g}, "
        f"lowest {min(line.y):.4g}, highest {max(line.y):.4g}"
    )
