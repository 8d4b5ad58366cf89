"""`accord resume`."""

from __future__ import annotations

from cluster.commands.options import RunDirectory


def resume(run: RunDirectory) -> None:
    """Go on with a run that was paused with `accord pause`.

    A run that has ended is continued with `accord train --resume RUN`.

    Example: `accord resume runs/my-run`
    """
    from cluster.runs.console import result
    from cluster.runs.steer import unpause

    result(unpause(run, 5.0))
