"""`accord scale`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cluster.commands.options import RunDirectory, Wait
from cluster.contracts.errors import UserError

MOST_WORKERS = 100_000


def _number(word: str) -> int | str:
    if word == "auto":
        return word
    if not word.isdecimal() or int(word) > MOST_WORKERS:
        raise typer.BadParameter(f"{word!r} is no number of workers: give 0 or more, or auto")
    return int(word)


def scale(
    run: RunDirectory,
    workers: Annotated[
        Any,
        typer.Argument(
            help="Rollout workers wanted, 0 or more. `auto`: rollout.autoscale chooses again.",
            metavar="N",
            parser=_number,
        ),
    ] = None,
    reward: Annotated[
        int | None,
        typer.Option("--reward", min=1, help="Reward services wanted (reward.replicas)."),
    ] = None,
    wait: Wait = 60.0,
) -> None:
    """Change the number of workers or reward services of a run.

    The command says when the run has taken the request and what came of it. A worker that is
    removed first finishes its current work. With 0 workers, training waits for more.

    Example: `accord scale runs/my-run 3`

    Example: `accord scale runs/my-run --reward 2`
    """
    from cluster.runs.console import result
    from cluster.runs.steer import scale_rewards, scale_workers

    if workers is None and reward is None:
        raise UserError("no number given", where="accord scale", fix="accord scale RUN N")
    if workers is not None:
        result(scale_workers(run, workers, wait))
    if reward is not None:
        result(scale_rewards(run, reward, wait))
