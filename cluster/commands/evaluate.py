"""`accord evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import RUN, Config, Overrides, Quiet, load, print_path, reporter


def evaluate(
    config: Config,
    overrides: Overrides = None,
    frontier: Annotated[
        Path | None,
        typer.Option(
            **RUN,
            help="Compare every checkpoint of this run with the policy that it started from, and "
            "show score and reward against the square root of the KL.",
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Compare two policies on the same prompts, or rank several.

    The judge in the config scores the completions, or compares them two at a time: rewards, an AI
    judge, or people. The win rate and the ranking come with confidence intervals.

    Example: `accord evaluate examples/evaluate.toml policy.path=runs/q/policy`

    Example: `accord evaluate examples/evaluate_ranking.toml --frontier runs/q`
    """
    from cluster.assembly.forked_roles import forked_roles
    from cluster.assembly.run_frontier import frontier_of
    from cluster.contracts.config.evaluate import EvaluateConfig
    from cluster.machine.imports import quick_imports

    found, words = (None, []) if frontier is None else frontier_of(frontier)
    settings = load(EvaluateConfig, config, [*(overrides or []), *words], "evaluate")
    with forked_roles(settings.cluster, "sampling"):
        with quick_imports():
            from cluster.assembly.evaluation import run_evaluation
        print_path(run_evaluation(settings, reporter(quiet), found))
