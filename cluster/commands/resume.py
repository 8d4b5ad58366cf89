"""`accord resume`."""

from __future__ import annotations

from cluster.commands.options import Overrides, Quiet, RunDirectory


def resume(run: RunDirectory, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Go on with a paused run, or with a pipeline that stopped.

    A run is paused with `accord pause`.

    A training run that has ended is continued with `accord train --resume RUN`.

    Example: `accord resume runs/my-run`

    Example: `accord resume runs/my-rounds choice.count=40`
    """
    from cluster.commands.pipeline import go_on
    from cluster.contracts.errors import UserError
    from cluster.pipeline.pipeline import is_pipeline
    from cluster.runs.console import result
    from cluster.runs.steer import unpause

    if is_pipeline(str(run)):
        go_on(str(run), overrides or [], quiet)
        return
    if overrides:
        raise UserError(
            "a paused run goes on with the settings that it has",
            where="command line",
            fix="stop it, and give them to `accord train --resume`",
        )
    result(unpause(run, 5.0))
