"""`accord card`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import complete_run


def card(
    of: Annotated[
        Path,
        typer.Argument(
            help="A run directory, or a snapshot.", metavar="RUN", autocompletion=complete_run
        ),
    ],
) -> None:
    """Write the model card of a run or a snapshot's data card.

    Cards say where a model came from, which labels it learnt from, how it was trained and
    evaluated, and what is not known. Of a pipeline, the command writes the cards of all stages.
    `accord pipeline` does the same when it ends.

    Example: `accord card runs/my-run`
    """
    from cluster.assembly.cards.model_card import write_model_card
    from cluster.assembly.cards.write import write_cards
    from cluster.runs.console import result

    written = write_cards(of) or [write_model_card(of)]
    result("\n".join(str(path) for path in written))
