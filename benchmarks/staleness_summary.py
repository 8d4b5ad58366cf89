"""Numbers, table and plot of the runs of `staleness_curves.py`."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from record import cpu_model

LAST = 2
"""Evaluations at the end of a run that its final numbers are the mean of."""
MEASURES = ("objective", "gold", "reward", "kl")


def objective(point: Mapping[str, float], regime: Mapping[str, Any]) -> float:
    """What PPO is asked to raise, on held-out prompts: reward - coef * KL - penalty * cut off."""
    cut = 1.0 - point["ended"]
    return point["reward"] - regime["kl_coef"] * point["kl"] - regime["eos_penalty"] * cut


def summarise(records: Sequence[Mapping[str, Any]], regime: Mapping[str, Any]) -> dict[str, Any]:
    """Per variant: mean and standard error over seeds, at the end and over training, and the same
    of the difference to the first variant, seed by seed. One seed has no standard error: None."""
    names = list(dict.fromkeys(record["variant"] for record in records))
    by_name = {
        name: [_numbers(r, regime) for r in records if r["variant"] == name] for name in names
    }
    rows = {}
    for name in names:
        keys = by_name[name][0]
        rows[name] = {
            key: {
                **_mean_se([run[key] for run in by_name[name]]),
                "minus_first": _mean_se(
                    [
                        run[key] - first[key]
                        for run, first in zip(by_name[name], by_name[names[0]], strict=True)
                    ]
                ),
            }
            for key in keys
        }
    return {"first": names[0], "seeds": len(by_name[names[0]]), "variants": rows}


def _numbers(record: Mapping[str, Any], regime: Mapping[str, Any]) -> dict[str, float]:
    points = [
        {**point, "objective": objective(point, regime)}
        for point in record["curve"]
        if point["step"] > 0
    ]
    found = {f"{key}": fmean(p[key] for p in points[-LAST:]) for key in MEASURES}
    found["objective_over_training"] = fmean(p["objective"] for p in points)
    found["gold_over_training"] = fmean(p["gold"] for p in points)
    found["ess"] = fmean(record["training"]["ess"])
    return found


def _mean_se(numbers: Sequence[float]) -> dict[str, float | None]:
    """Mean and its standard error."""
    error = round(stdev(numbers) / len(numbers) ** 0.5, 4) if len(numbers) > 1 else None
    return {"mean": round(fmean(numbers), 4), "se": error}


def statements(summary: Mapping[str, Any]) -> list[str]:
    """Each variant against the first one, in words, by the objective at the end of training.

    "not worse": by one standard error of the paired difference at most; "worse": by three or more.
    """
    found, first = [], summary["first"]
    for name, row in summary["variants"].items():
        gap = row["objective"]["minus_first"]
        if name == first or not gap["se"]:
            continue
        errors = gap["mean"] / gap["se"]
        share = gap["mean"] / abs(summary["variants"][first]["objective"]["mean"])
        verdict = "perhaps worse than"
        if errors >= -1.0:
            verdict = "not worse than"
        elif errors <= -3.0:
            verdict = "worse than"
        found.append(f"{name}: {verdict} {first} ({errors:+.1f} standard errors, {share:+.1%})")
    return found


def table(summary: Mapping[str, Any]) -> str:
    """The Markdown table of docs/results.md."""
    lines = [
        "| lag, correction | objective | minus lag 0 | over training, minus lag 0 | gold judge "
        "| minus lag 0 | KL | ESS |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in summary["variants"].items():
        own = name == summary["first"]
        cells = [
            _pm(row["objective"]),
            "" if own else _pm(row["objective"]["minus_first"], sign=True),
            "" if own else _pm(row["objective_over_training"]["minus_first"], sign=True),
            _pm(row["gold"]),
            "" if own else _pm(row["gold"]["minus_first"], sign=True),
            _pm(row["kl"], digits=1),
            f"{row['ess']['mean']:.2f}",
        ]
        lines.append(f"| {name.removeprefix('lag ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _pm(number: Mapping[str, float | None], *, digits: int = 2, sign: bool = False) -> str:
    mean, error = number["mean"], number["se"]
    text = f"{mean:+.{digits}f}" if sign else f"{mean:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def write_results(
    path: Path,
    records: Sequence[Mapping[str, Any]],
    regime: Mapping[str, Any],
    summary: Mapping[str, Any],
) -> None:
    """One JSON file: where and when, settings, summary, and every run's curve."""
    content = {
        "date": time.strftime("%Y-%m-%d"),
        "commits": sorted({record["commit"] for record in records}),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers")},
        },
        "hardware": {"cpu": cpu_model(), "cores": os.cpu_count(), "threads": 1},
        "regime": regime,
        "summary": summary,
        "runs": [{k: v for k, v in record.items() if k != "regime"} for record in records],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_compact(content) + "\n", encoding="utf-8")


def _compact(content: Mapping[str, Any]) -> str:
    """Indented, but each run on a line of its own."""
    runs = ",\n    ".join(json.dumps(run) for run in content["runs"])
    head = json.dumps({**content, "runs": []}, indent=2)
    return head.replace('"runs": []', f'"runs": [\n    {runs}\n  ]')


def write_plot(path: Path, records: Sequence[Mapping[str, Any]], regime: Mapping[str, Any]) -> None:
    """Objective and gold judge by step: mean over seeds, one standard error as a band."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "accord"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    names = list(dict.fromkeys(record["variant"] for record in records))
    for axis, key in zip(axes, ("objective", "gold"), strict=True):
        for name in names:
            curves = [
                [objective(p, regime) if key == "objective" else p["gold"] for p in r["curve"]]
                for r in records
                if r["variant"] == name
            ]
            steps = [p["step"] for p in next(r for r in records if r["variant"] == name)["curve"]]
            columns = [_mean_se(column) for column in zip(*curves, strict=True)]
            middle = [c["mean"] or 0.0 for c in columns]
            width = [c["se"] or 0.0 for c in columns]
            line = axis.plot(steps, middle, label=name, linewidth=1.4)[0]
            low = [m - w for m, w in zip(middle, width, strict=True)]
            high = [m + w for m, w in zip(middle, width, strict=True)]
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set_xlabel("learner step")
        axis.set_title({"objective": "reward - coef * KL, held out", "gold": "gold judge"}[key])
    axes[0].legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
