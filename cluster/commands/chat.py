"""`accord chat`."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.commands.options import complete_run, say_at_once

_MODEL = {"metavar": "MODEL", "autocompletion": complete_run}


def chat(
    model: Annotated[
        str, typer.Argument(help="A run directory, a model directory or a hub id.", **_MODEL)
    ],
    before: Annotated[
        str | None, typer.Option(help="A second model, which answers first.", **_MODEL)
    ] = None,
    reward: Annotated[
        str | None, typer.Option(help="A reward model that scores each answer.", **_MODEL)
    ] = None,
    safety: Annotated[
        str | None,
        typer.Option(
            help="TOML file with the keys of the safety layer. Answers are checked before they "
            "are shown.",
            metavar="FILE",
        ),
    ] = None,
    history: Annotated[
        bool,
        typer.Option(help="Whether the model sees earlier turns."),
    ] = True,
    max_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Longest answer in tokens.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, metavar="T", help="0: always the most likely token.")
    ] = 0.7,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of sampling.")] = 0,
) -> None:
    """Talk to a policy, or to two side by side.

    The models answer in this process, with transformers. In the chat, /help lists the commands. A
    model that was trained on single questions answers best with --no-history.

    Example: `accord chat runs/quickstart --no-history --before runs/quickstart/sft/policy`

    Example: `accord chat my-policy --reward runs/my-reward-model`
    """
    import sys

    say_at_once("loading ...", quiet=not sys.stdin.isatty())
    from cluster.chat.session import chat_loop
    from cluster.chat.voice import ChatSettings

    chat_loop(
        model,
        before,
        settings=ChatSettings(max_tokens=max_tokens, temperature=temperature),
        seed=seed,
        reward=reward,
        safety=safety,
        remember=history,
    )
