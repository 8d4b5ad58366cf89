"""`accord chat`."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.commands.options import complete_run, say_at_once

_MODEL = {"metavar": "MODEL", "autocompletion": complete_run}


def _port(value: str | int) -> int:
    """Of what was typed, or of the default."""
    if not str(value).isdecimal() or int(value) > 65535:
        raise typer.BadParameter(f"{value!r} is not a port: a number from 0 to 65535")
    return int(value)


def chat(
    model: Annotated[
        str | None,
        typer.Argument(help="A run directory, a model directory or a hub id.", **_MODEL),
    ] = None,
    before: Annotated[
        str | None, typer.Option(help="A second model, which answers first.", **_MODEL)
    ] = None,
    after: Annotated[
        str | None, typer.Option(help="The same as MODEL, beside --before.", **_MODEL)
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="A policy of MODEL's run, or a LoRA folder.",
            metavar="NAME",
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="Preference store (*.db) for votes.",
            metavar="STORE",
        ),
    ] = None,
    page: Annotated[
        bool, typer.Option("--page", help="A page with a vote. Needs --before, --store.")
    ] = False,
    port: Annotated[
        int,
        typer.Option(parser=_port, metavar="N", help="Port of the page. 0: any free one."),
    ] = 8272,
    reward: Annotated[
        str | None, typer.Option(help="A reward model that scores each answer.", **_MODEL)
    ] = None,
    safety: Annotated[
        str | None,
        typer.Option(
            help="TOML file of the safety layer, which checks each answer.",
            metavar="FILE",
        ),
    ] = None,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Show the model the newest question only.")
    ] = False,
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

    Example: `accord chat --before runs/a --after runs/b --store preferences.db --page`
    """
    import sys

    from cluster.contracts.errors import UserError

    chosen = [one for one in (model, after) if one is not None]
    if len(chosen) != 1:
        raise UserError(
            "no model given" if not chosen else "MODEL and --after are the same thing",
            where="accord chat",
            fix="accord chat MODEL, or accord chat --before A --after B",
        )
    if page and (before is None or store is None):
        raise UserError(
            "the page compares two models and keeps the votes",
            where="--page",
            fix="add --before MODEL and --store preferences.db",
        )
    if adapter is not None:
        from cluster.runs.policies import adapter_directory

        chosen = [adapter_directory(chosen[0], adapter)]
    say_at_once("loading ...", quiet=not sys.stdin.isatty() and not page)
    from cluster.machine.imports import quick_imports

    with quick_imports():
        from cluster.chat.voice import ChatSettings

    settings = ChatSettings(max_tokens=max_tokens, temperature=temperature)
    if page and before is not None and store is not None:
        from cluster.chat.chat_page import serve_until_stopped

        serve_until_stopped(
            chosen[0], before, store,
            settings=settings, seed=seed, safety=safety, remember=not no_history, port=port,
        )  # fmt: skip
        return
    from cluster.chat.chat import chat_loop

    chat_loop(
        chosen[0],
        before,
        settings=settings,
        seed=seed,
        reward=reward,
        safety=safety,
        remember=not no_history,
        store=store,
    )
