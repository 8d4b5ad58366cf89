"""`accord plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.commands.options import Config, Json, Overrides, load, reporter


def plan(
    config: Config,
    overrides: Overrides = None,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Run each role for some seconds and predict the whole run."),
    ] = False,
    gpus: Annotated[
        int,
        typer.Option(
            min=0, help="Say what the run needs of so many GPUs, which need not be there."
        ),
    ] = 0,
    gpu_memory_gb: Annotated[
        float, typer.Option(min=1, help="Memory of each of them, in GB of 2^30 bytes.")
    ] = 80.0,
    model_config: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="With --gpus: the model's config.json; no weights needed."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a training config and print every value in force.

    The plan also shows what follows from the values. With --probe it predicts step time,
    bottleneck and memory, and which staleness bound and number of workers the run needs.
    With --gpus it prints the bytes of each GPU by purpose instead, what does not fit, and which
    keys to change.

    Example: `accord plan examples/ppo.toml batch.prompts_per_step=16`
    """
    from cluster.contracts.config.train import TrainConfig
    from cluster.measure.fits import show_fit
    from cluster.measure.plan import show_plan

    settings = load(TrainConfig, config, overrides, "plan")
    if gpus:
        show_fit(settings, gpus, gpu_memory_gb, model_config, as_json)
        return
    show_plan(settings, as_json, probe, reporter(quiet=as_json))
