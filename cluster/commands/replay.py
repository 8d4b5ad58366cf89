"""`accord replay`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import RUN, Quiet, reporter


def replay(
    run: Annotated[Path, typer.Argument(help="A run directory of `accord train`.", **RUN)],
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Exit with code 1 at the first difference and name the step."
        ),
    ] = False,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Replay only this many steps, from the first.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train again on a run's saved rollouts, without Ray and vLLM.

    The command measures how fast the learner is alone. With --verify it also checks that every step
    gives the same weights, bit for bit.

    Example: `accord replay runs/my-run --verify`
    """
    from cluster.assembly.replay import replay_run

    replay_run(str(run), verify, steps, reporter(quiet))
