"""`accord quickstart`."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.commands.options import Quiet, reporter, say_at_once


def quickstart(
    directory: Annotated[
        str, typer.Option("--dir", help="Folder that will hold the run directory.")
    ] = "runs",
    name: Annotated[
        str,
        typer.Option(
            help="Run name. Default: quickstart, or a timestamped name if that exists.",
            show_default=False,
        ),
    ] = "",
    seed: Annotated[int, typer.Option(help="Seed of data, models and sampling.")] = 0,
    scale: Annotated[
        float,
        typer.Option(help="Size of the job. 1 takes some minutes on 2 cores; 0.1 is a smoke test."),
    ] = 1.0,
    kl_coef: Annotated[
        float | None,
        typer.Option(help="KL coefficient of PPO. 0 shows what happens without the penalty."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Run the whole pipeline on a built-in task, offline on CPU.

    The command creates a small language model, fine-tunes it on demonstrations, samples completions
    with vLLM, lets simulated annotators compare them, trains a reward model, runs PPO on Ray, and
    compares the result with the model it started from.

    Example: `accord quickstart --seed 1`
    """
    say_at_once("accord quickstart: the whole loop on an embedded help-desk task", quiet)
    from cluster.machine.imports import quick_imports

    with quick_imports():
        from cluster.quickstart.quickstart import quickstart as run

    run(directory, name, seed, scale, kl_coef, reporter(quiet))
