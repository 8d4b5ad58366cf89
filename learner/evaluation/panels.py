"""The figures of a report, computed from the rows a run left: tables, headline, scatter charts.

Pure: rows in, plain values out. Everything that is not in the rows is None and shown as absent.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from learner.evaluation import charts, frontier
from learner.evaluation.event_rows import notable
from learner.evaluation.lines import ends, series
from learner.evaluation.reward_panel import reward_figures
from learner.evaluation.rounds import Rates
from learner.evaluation.run_files import Row, number
from learner.evaluation.samples import Sample, TextStats, text_stats


@dataclass(frozen=True, slots=True)
class TableRow:
    name: str
    mean: float
    last: float
    low: float
    high: float


def table(rows: Sequence[Row], prefixes: Sequence[str]) -> list[TableRow]:
    """One line a metric whose name begins with a prefix, by name."""
    names = sorted({name for row in rows for name in row if name.startswith(tuple(prefixes))})
    found = []
    for name in names:
        values = series(rows, name)[1]
        if values:
            mean = statistics.fmean(values)
            found.append(TableRow(name, mean, values[-1], min(values), max(values)))
    return found


def wall_seconds(rows: Sequence[Row], stages: Sequence[Row]) -> float | None:
    """Of all stages where they are recorded, else of the training in ``metrics.jsonl``.

    That is ``run/elapsed_s``, which leaves out the time a run lay stopped before a resume; without
    it ``time``, which is seconds since the run began or since 1970 (then the difference counts).
    """
    spent = [value for stage in stages if (value := number(stage, "seconds")) is not None]
    if spent:
        return math.fsum(spent)
    elapsed = series(rows, "run/elapsed_s")[1]
    if elapsed:
        return elapsed[-1]
    times = [value for row in rows if (value := number(row, "time")) is not None]
    if not times:
        return None
    return times[-1] - times[0] if times[0] > 1e8 else times[-1]


def summary(
    name: str,
    rows: Sequence[Row],
    evaluation: Row,
    reward_model: Row,
    stages: Sequence[Row],
    events: Sequence[Row],
) -> dict[str, Any]:
    """The key figures, as ``summary.json`` holds them; None where the run does not say."""
    figures: dict[str, Any] = {"run": name, "steps": len(rows) or None}
    for key in ("win_rate", "ci_low", "ci_high", "length_controlled_win_rate"):
        figures[key] = number(evaluation, key)
    for key, metric in (
        ("reward", "objective/scores"),
        ("kl", "objective/kl"),
        ("length", "completions/mean_length"),
        ("entropy", "policy/entropy"),
    ):
        both = ends(series(rows, metric)[1])
        figures[f"{key}_first"], figures[f"{key}_last"] = both or (None, None)
    for key in ("mean_score", "mean_length"):
        for who in ("policy", "baseline"):
            figures[f"{key}_{who}"] = number(evaluation, f"{key}_{who}")
    for key in ("accuracy", "ece", "loss"):
        figures[f"reward_model_{key}"] = number(reward_model, key)
    figures |= {f"reward_model_{k}": value for k, value in reward_figures(reward_model).items()}
    for key, metric in (
        ("staleness_mean", "async/staleness_mean"),
        ("overlap", "perf/overlap_frac"),
        ("throughput", "perf/throughput"),
    ):
        values = series(rows, metric)[1]
        figures[key] = statistics.fmean(values) if values else None
    figures["wall_seconds"] = wall_seconds(rows, stages)
    figures["notable_events"] = sum(notable(event) for event in events)
    return figures


JUDGED = "evaluation/score"
JUDGED_KL = "evaluation/kl"


def frontier_charts(rows: Sequence[Row], evaluation: Row | None) -> list[tuple[Markup, str]]:
    """Score against sqrt(KL) with one sentence each about the best point: the training reward, and
    a judge's score while it trained or (``evaluation``) of its checkpoints."""
    trained = frontier.points(rows, window=max(1, len(rows) // 20))
    judged = frontier.points(rows, JUDGED, JUDGED_KL) or frontier.points(rows, JUDGED)
    checkpoints = [row for row in (evaluation or {}).get("frontier") or [] if isinstance(row, dict)]
    found = [
        ("frontier", "the training reward", "reward", trained),
        ("frontier-judged", "the judge's score", "judge's score", judged),
    ] + [
        (f"frontier-{key}", f"{whose} of the checkpoints", label, points)
        for key, whose, label in (
            ("score", "the judge's score", "judge's score"),
            ("reward", "the training reward", "reward"),
        )
        if (points := frontier.points(checkpoints, key, "kl"))
    ]
    return [_frontier_chart(*one) for one in found if len(one[-1]) > 1]


def _frontier_chart(
    name: str, whose: str, label: str, found: Sequence[frontier.Point]
) -> tuple[Markup, str]:
    best = frontier.best_point(found)
    assert best is not None  # there are points
    text = (
        f"The highest of {whose} is {best.score:.3g}, at step {best.step}, "
        f"{best.distance:.3g} from the reference (square root of KL in nats)."
    )
    chart = charts.scatter_chart(
        name,
        f"{label.capitalize()} against distance from the reference",
        [p.distance for p in found],
        [p.score for p in found],
        ("square root of KL", label),
        f"{len(found)} points in training order. {text}",
    )
    return chart, text


def _lengths_and_scores(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    pairs = [
        (length, score)
        for row in rows
        if (length := number(row, "completions/mean_length")) is not None
        and (score := number(row, "objective/scores")) is not None
    ]
    return [p[0] for p in pairs], [p[1] for p in pairs]


def length_correlation(rows: Sequence[Row]) -> float | None:
    """Of score and completion length over the steps."""
    return correlation(*_lengths_and_scores(rows))


def length_chart(rows: Sequence[Row]) -> Markup | None:
    """Score against completion length by step."""
    x, y = _lengths_and_scores(rows)
    if len(x) < 3:
        return None
    r = correlation(x, y)
    told = "no correlation can be given" if r is None else f"correlation {r:.2f}"
    labels = ("mean completion length, tokens", "reward")
    alt = f"{len(x)} learner steps; {told}."
    return charts.scatter_chart("length", "Reward against completion length", x, y, labels, alt)


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's r; None where one side does not vary."""
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    return statistics.correlation(x, y)


def sample_stats(samples: Sequence[Sample]) -> tuple[TextStats, TextStats] | None:
    if not samples:
        return None
    return text_stats([s.before for s in samples]), text_stats([s.after for s in samples])


def reliability_panel(reward_model: Row) -> Markup | None:
    """The chart of ``reliability`` (records of ``calibration.Bin``), where they are whole."""
    bins = reward_model.get("reliability")
    if not isinstance(bins, list) or not bins:
        return None
    points = []
    for item in bins:
        if not isinstance(item, dict):
            return None
        values = [number(item, key) for key in ("mean_probability", "frequency", "count")]
        if values[0] is None or values[1] is None or not values[2]:
            return None
        points.append((values[0], values[1], int(values[2])))
    alt = "; ".join(f"predicted {p:.2f}, true {f:.2f} of {n}" for p, f, n in points)
    return charts.reliability_chart("reliability", "Calibration of the reward model", points, alt)


def rounds_chart(rates: Sequence[Rates]) -> Markup | None:
    """Win rates by round; None before the first evaluation."""
    known = [line for line in rates if line.rounds]
    if not known:
        return None
    drawn = [
        (line.label, line.rounds, line.rate, tuple(zip(line.low, line.high, strict=True)))
        for line in known
    ]
    alt = "; ".join(
        f"{line.label}: " + ", ".join(
            f"round {n} {rate:.1%}" for n, rate in zip(line.rounds, line.rate, strict=True)
        )
        for line in known
    )  # fmt: skip
    title = "Win rate by round, with 95 % intervals"
    return charts.round_chart("rounds", title, drawn, ("round", "win rate"), alt, 0.5)
