"""Two to four runs side by side: the settings that differ, their numbers, their curves.

Runs are called A, B, ... in tables and curves, as names of runs can be long, or equal.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learner.evaluation.run_files import Row, RunFiles, number

LETTERS = "ABCD"
MOST_RUNS = len(LETTERS)
Best = Callable[[Sequence[float]], float]

# metric -> (what it is, which value is the best; None where neither end is)
METRICS: dict[str, tuple[str, Best | None]] = {
    "objective/scores": ("reward", max),
    "objective/kl": ("KL to the reference, nats per completion", None),
    "objective/entropy": ("entropy, nats per token", None),
    "completions/mean_length": ("completion length, tokens", None),
    "completions/clipped_ratio": ("completions cut at max_tokens, share", None),
    "rewards/zero_std_frac": ("groups without a learning signal, share", None),
    "value/explained_var": ("explained variance of the value network", max),
    "train/loss": ("training loss", min),
    "eval/loss": ("held-out loss", min),
    "eval/accuracy": ("held-out token accuracy", max),
    "rm/loss": ("held-out loss of the reward model", min),
    "rm/accuracy": ("held-out pairs ranked right, share", max),
    "rm/ece": ("calibration error of the reward model", min),
    "rewards/accuracies": ("pairs ranked right, share", max),
    "rewards/margins": ("reward margin of the chosen completion", max),
    "eval/rewards/accuracies": ("held-out pairs ranked right, share", max),
    "eval/rewards/margins": ("held-out reward margin of the chosen completion", max),
    "async/staleness_mean": ("staleness, learner steps", None),
    "time/step": ("seconds per step", min),
    "perf/throughput": ("trained tokens per second", max),
}
HEADLINES = (  # whose curves are drawn where there is little room
    "objective/scores",
    "objective/kl",
    "completions/mean_length",
    "train/loss",
    "eval/loss",
    "rm/accuracy",
    "rewards/accuracies",
    "eval/rewards/accuracies",
)
_SOURCE = re.compile("rewards/[^/]+/mean")
UNCOMPARED = ("run.name", "run.dir")  # they differ between any two runs


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedRun:
    """``settings``: its config with dotted keys, and what the run was made with.
    ``series``: metric -> (steps, values), both ascending by step."""

    letter: str
    path: Path
    command: str
    status: str
    settings: Mapping[str, Any]
    series: Mapping[str, tuple[list[float], list[float]]]
    win_rate: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRow:
    """One metric of all runs, in their order; None where a run does not have it.
    ``best``: (value, step), or None for a metric of which neither end is the better."""

    metric: str
    title: str
    last: tuple[float | None, ...]
    best: tuple[tuple[float, int] | None, ...]


def read_runs(
    paths: Sequence[Path], rows_of: Callable[[Path], Sequence[Row]] | None = None
) -> list[ComparedRun]:
    """``rows_of``: of a run directory, its metrics ascending by step (default: all)."""
    return [_read(letter, path, rows_of) for letter, path in zip(LETTERS, paths, strict=False)]


def differing_settings(runs: Sequence[ComparedRun]) -> list[tuple[str, tuple[str, ...]]]:
    """(key, value in each run as text; "-" where a run does not have the key), by key."""
    keys = sorted({key for run in runs for key in run.settings} - set(UNCOMPARED))
    rows = [(key, tuple(_shown(run.settings.get(key)) for run in runs)) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def metric_rows(runs: Sequence[ComparedRun]) -> list[MetricRow]:
    """The metrics that any of the runs has; one row per reward source among them."""
    return [
        MetricRow(
            metric=metric,
            title=title,
            last=tuple(_last(run, metric) for run in runs),
            best=tuple(_best(run, metric, better) for run in runs),
        )
        for metric, (title, better) in _metrics(runs).items()
        if any(metric in run.series for run in runs)
    ]


def sparklines(runs: Sequence[ComparedRun], metric: str, width: int = 48) -> list[str]:
    """A line of bars per run, all with the same scale of steps and values; empty without data."""
    found = [run.series.get(metric, ([], [])) for run in runs]
    steps = [step for run_steps, _ in found for step in run_steps]
    values = [value for _, run_values in found for value in run_values]
    if not values:
        return ["" for _ in runs]
    span = (min(steps), max(steps))
    width = min(width, int(span[1] - span[0]) + 1)
    return [_bars(*one, span, (min(values), max(values)), width) for one in found]


def _bars(
    steps: Sequence[float],
    values: Sequence[float],
    span: tuple[float, float],
    limits: tuple[float, float],
    width: int,
) -> str:
    """Each bar is the mean of its steps; steps between two that were recorded repeat the first."""
    bins: list[list[float]] = [[] for _ in range(width)]
    scale = (width - 1) / (span[1] - span[0]) if span[1] > span[0] else 0.0
    for step, value in zip(steps, values, strict=True):
        bins[round((step - span[0]) * scale)].append(value)
    filled = [at for at, inside in enumerate(bins) if inside]
    height = limits[1] - limits[0]
    line, level = "", " "
    for at, inside in enumerate(bins):
        if inside:
            share = (sum(inside) / len(inside) - limits[0]) / height if height else 0.5
            level = "▁▂▃▄▅▆▇█"[min(7, int(share * 8))]
        line += level if filled and at <= filled[-1] else " "
    return line.rstrip()


def _metrics(runs: Sequence[ComparedRun]) -> dict[str, tuple[str, Best | None]]:
    names = {name for run in runs for name in run.series}
    sources = sorted(n for n in names if _SOURCE.fullmatch(n))
    rewards: dict[str, tuple[str, Best | None]] = {
        name: (f"reward of source {name.split('/')[1]}", max) for name in sources
    }
    first = "objective/scores"
    return {first: METRICS[first], **(rewards if len(rewards) > 1 else {}), **METRICS}


def _last(run: ComparedRun, metric: str) -> float | None:
    return run.series[metric][1][-1] if metric in run.series else None


def _best(run: ComparedRun, metric: str, better: Best | None) -> tuple[float, int] | None:
    if better is None or metric not in run.series:
        return None
    steps, values = run.series[metric]
    best = better(values)
    return best, int(steps[values.index(best)])


def _read(letter: str, path: Path, rows_of: Callable[[Path], Sequence[Row]] | None) -> ComparedRun:
    files = RunFiles(path)
    manifest = files.json_object("manifest.json") or {}
    return ComparedRun(
        letter=letter,
        path=path,
        command=str(manifest.get("command", "?")),
        status=str(manifest.get("status", "?")),
        settings={**_config(files), **_made_with(manifest)},
        series=_series((rows_of(path) if rows_of else files.metrics()) or []),
        win_rate=number(files.json_object("evaluation.json") or {}, "win_rate"),
    )


def _series(rows: Sequence[Row]) -> dict[str, tuple[list[float], list[float]]]:
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for name in row:
            value = number(row, name)
            if value is not None and name not in ("step", "time"):
                steps, values = found.setdefault(name, ([], []))
                steps.append(float(row["step"]))
                values.append(value)
    return found


def _config(files: RunFiles) -> dict[str, Any]:
    try:
        return dict(_flat(tomllib.loads(files.text("config.toml") or "")))
    except ValueError:
        return {}


def _made_with(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What is no setting and may explain a difference: the code, the libraries, the machine."""
    versions = manifest.get("versions")
    found = (
        {f"version of {k}": v for k, v in versions.items()} if isinstance(versions, dict) else {}
    )
    commit = manifest.get("git_commit")
    return found | ({"commit of accord": str(commit)[:12]} if commit else {})


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys; the items of a list of tables are numbered from 0."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list) and tree and all(isinstance(item, dict) for item in tree):
        for at, item in enumerate(tree):
            yield from _flat(item, f"{prefix}.{at}")
    else:
        yield prefix, tree


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return str(value).lower() if isinstance(value, bool) else str(value)
