"""`accord pause`."""

from __future__ import annotations

from cluster.commands.options import RunDirectory, Wait


def pause(run: RunDirectory, wait: Wait = 60.0) -> None:
    """Let a run in progress rest until `accord resume`.

    It finishes what is under way, and begins nothing new. Workers and learner keep their memory.

    Example: `accord pause runs/my-run`
    """
    from cluster.runs.console import result
    from cluster.runs.steer import pause as ask

    result(ask(run, wait))
