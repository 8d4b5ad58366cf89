"""`accord stop`."""

from __future__ import annotations

from cluster.commands.options import RunDirectory, Wait


def stop(run: RunDirectory, wait: Wait = 300.0) -> None:
    """End a run after its current step, with a checkpoint.

    The run's own command then exits with 0. `accord train --resume RUN` continues it.

    Example: `accord stop runs/my-run`
    """
    from cluster.runs.console import result
    from cluster.runs.steer import stop as ask

    result(ask(run, wait))
