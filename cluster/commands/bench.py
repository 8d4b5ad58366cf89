"""`accord bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import Quiet, reporter


def bench(
    name: Annotated[
        str,
        typer.Argument(
            help="overlap, overlap-tail, overlap-fp32, rollout, learner, weights or controller."
        ),
    ],
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure for about a minute, with fewer repeats.")
    ] = False,
    repeats: Annotated[
        int | None,
        typer.Option(min=1, help="Number of measurements. Default: 5, with --quick 1."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the result to this file.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with code 1 if a ratio is outside its limits.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Measure how fast a part of Accord is on this machine.

    The result is the median of several measurements. docs/measure.md explains it.

    Example: `accord bench overlap --quick`
    """
    from cluster.measure.bench.common import BenchOptions, run_benchmark

    options = BenchOptions(repeats=repeats or (1 if quick else 5), quick=quick)
    run_benchmark(name, options, json_file, check, reporter(quiet))
