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
    as_json: Json = False,
) -> None:
    """Check a training config and print every value in force.

    The plan also shows what follows from the values. With --probe it predicts step time,
    bottleneck and memory, and which staleness bound and number of workers the run needs.

    Example: `accord plan examples/ppo.toml batch.prompts_per_step=16`
    """
    from cluster.contracts.config.train import TrainConfig
    from cluster.measure.plan import show_plan

    settings = load(TrainConfig, config, overrides, "plan")
    show_plan(settings, as_json, probe, reporter(quiet=as_json))
