"""The figures of a report, computed from the rows a run left: curves, tables, headline, warnings.

Pure: rows in, plain values out. Everything that is not in the rows is None and shown as absent.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from learner.evaluation import charts, frontier
from learner.evaluation.run_files import Row, number
from learner.evaluation.samples import Sample, TextStats, text_stats

# (metric names drawn together, title). A curve whose metrics a run does not have is left out.
CURVES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("objective/scores",), "Reward (score of the reward service)"),
    (("objective/kl",), "KL to the reference, nats an answer"),
    (("completions/mean_length",), "Answer length, tokens"),
    (("policy/entropy",), "Policy entropy, nats a token"),
    (("async/staleness_mean", "async/staleness_max"), "Staleness, learner steps"),
    (("perf/throughput", "rollout/tokens_per_s"), "Throughput, tokens a second"),
    (("policy/clipfrac",), "Share of clipped tokens"),
    (("value/explained_var",), "Explained variance of the value network"),
    (("eval/win_rate", "eval/win_rate_ci_low", "eval/win_rate_ci_high"), "Win rate while training"),
    (("rm/accuracy",), "Reward model accuracy"),
    (("rewards/accuracies",), "Share of pairs ranked right"),
    (("train/loss", "eval/loss"), "Loss"),
)
# Events of a run in which nothing went wrong; every other kind, known or not, is listed singly.
EVERYDAY = frozenset(
    {
        "checkpoint",
        "cluster",
        "loop_started",
        "run_finished",
        "swap",
        "worker_draining",
        "worker_serving",
    }
)


@dataclass(frozen=True, slots=True)
class TableRow:
    name: str
    mean: float
    last: float
    low: float
    high: float


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


def curves(rows: Sequence[Row]) -> list[Markup]:
    drawn = []
    for at, (names, title) in enumerate(CURVES):
        lines = [charts.Line(name, *found) for name in names if (found := series(rows, name))[0]]
        if lines:
            alt = "; ".join(_describe(line) for line in lines)
            drawn.append(charts.line_chart(f"curve{at}", title, lines, "learner step", alt))
    return drawn


def _describe(line: charts.Line) -> str:
    return (
        f"{line.label} over {len(line.y)} steps: from {line.y[0]:.4g} to {line.y[-1]:.4g}, "
        f"lowest {min(line.y):.4g}, highest {max(line.y):.4g}"
    )


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


def notable(event: Row) -> bool:
    return str(event.get("kind")) not in EVERYDAY


def event_counts(events: Sequence[Row]) -> list[tuple[str, int]]:
    return Counter(str(event.get("kind", "no kind")) for event in events).most_common()


def frontier_chart(rows: Sequence[Row]) -> tuple[Markup | None, str]:
    """Score against sqrt(KL), and one sentence about its best point."""
    gold = bool(series(rows, "eval/rm_score")[0])
    score = "eval/rm_score" if gold else frontier.PROXY
    found = frontier.points(rows, score, window=1 if gold else max(1, len(rows) // 20))
    best = frontier.best_point(found)
    if best is None or len(found) < 2:
        return None, ""
    whose = "the judge's score" if gold else "the training reward"
    text = (
        f"The highest of {whose} is {best.score:.4g}, at step {best.step}, "
        f"{best.distance:.3g} from the reference (square root of KL in nats)."
    )
    chart = charts.scatter_chart(
        "frontier",
        "Reward against distance from the reference",
        [p.distance for p in found],
        [p.score for p in found],
        ("sqrt(KL)", score),
        f"{len(found)} points in training order. {text}",
    )
    return chart, text


def length_chart(rows: Sequence[Row]) -> tuple[Markup | None, float | None]:
    """Score against answer length by step, and their correlation."""
    pairs = [
        (length, score)
        for row in rows
        if (length := number(row, "completions/mean_length")) is not None
        and (score := number(row, "objective/scores")) is not None
    ]
    if len(pairs) < 3:
        return None, None
    x, y = [p[0] for p in pairs], [p[1] for p in pairs]
    r = correlation(x, y)
    told = "no correlation can be given" if r is None else f"correlation {r:.2f}"
    labels = ("mean answer length, tokens", "reward")
    alt = f"{len(pairs)} learner steps; {told}."
    return charts.scatter_chart("length", "Reward against answer length", x, y, labels, alt), r


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's r; None where one side does not vary."""
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    return statistics.correlation(x, y)


def sample_stats(samples: Sequence[Sample]) -> tuple[TextStats, TextStats] | None:
    if not samples:
        return None
    return text_stats([s.before for s in samples]), text_stats([s.after for s in samples])


def warnings(
    figures: Mapping[str, Any],
    stats: tuple[TextStats, TextStats] | None,
    length_r: float | None,
) -> list[str]:
    """Signs that the reward was gamed, in plain words with the numbers that raised them."""
    found = []
    before, after = figures["length_first"], figures["length_last"]
    if before and after is not None and not 2 / 3 <= after / before <= 1.5:
        found.append(f"Answers went from {before:.3g} to {after:.3g} tokens on average.")
    if length_r is not None and length_r > 0.7:
        found.append(
            f"The reward follows answer length (correlation {length_r:.2f} over the steps)."
        )
    if stats and stats[1].repeated_3grams > stats[0].repeated_3grams + 0.1:
        found.append(
            f"Answers repeat themselves more: {stats[1].repeated_3grams:.0%} of their 3-grams are "
            f"repeats, {stats[0].repeated_3grams:.0%} before."
        )
    start, end = figures["reward_first"], figures["reward_last"]
    high = figures["ci_high"]
    if start is not None and end is not None and end > start and high is not None and high < 0.5:
        found.append("The training reward rose, but the judge prefers the baseline.")
    entropy = figures["entropy_first"], figures["entropy_last"]
    if entropy[0] and entropy[1] is not None and entropy[1] < 0.2 * entropy[0]:
        found.append(f"Entropy fell from {entropy[0]:.3g} to {entropy[1]:.3g} nats a token.")
    return found


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
