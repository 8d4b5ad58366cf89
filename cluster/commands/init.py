"""`accord init`."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.contracts.errors import UserError

if TYPE_CHECKING:
    from cluster.assembly.new_config import Algorithm


class Method(StrEnum):
    """What the config is for."""

    grpo = "grpo"
    ppo = "ppo"
    sft = "sft"
    dpo = "dpo"
    reward_model = "reward-model"


def init(
    target: Annotated[
        Path, typer.Argument(metavar="DIR|FILE.toml", help="Where to write the config.")
    ] = Path(),
    algorithm: Annotated[
        Method | None, typer.Option(help="Training method. Default: grpo.", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model directory or hub id.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "--prompts",
            help="File of prompts (grpo, ppo), of rows (sft) or of pairs (dpo, reward-model).",
        ),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            help="grpo, ppo: FILE.py:FUNCTION, a reward model's directory, or HOST:PORT. "
            "Without it, a reward.py to start from is written, too."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="grpo, ppo: learner steps.")] = 100,
) -> None:
    """Write a commented config for your model and data.

    On a terminal, the command asks for the options that you leave out. It never overwrites a file.

    Example: `accord init --model my-model --prompts prompts.jsonl --reward reward.py:score`
    """
    from cluster.assembly.new_config import Answers, command_of, write_new_config
    from cluster.runs.console import result

    asks = sys.stdin.isatty()
    if not asks and (model is None or data is None):
        missing = [n for n, v in (("--model", model), ("--data", data)) if v is None]
        raise UserError(
            f"needs {' and '.join(missing)}, as there is no terminal to ask on",
            where="accord init",
            fix="accord init --model MODEL --data FILE",
        )
    chosen: Algorithm = (algorithm or _asked_method(asks)).value
    trains = chosen in ("grpo", "ppo")
    answers = Answers(
        algorithm=chosen,
        model=model if model is not None else _ask("Model (directory or hub id)"),
        data=data if data is not None else _ask("Prompts (file)" if trains else "Data (file)"),
        reward=reward or (_ask_reward() if asks and trains and reward is None else ""),
        steps=steps,
    )
    written = write_new_config(target, answers)
    for path in written:
        result(str(path))
    first = f"accord plan {written[0]}" if trains else f"{command_of(chosen)} {written[0]}"
    sys.stderr.write(f"next: {first}\n")


def _asked_method(asks: bool) -> Method:
    if not asks:
        return Method.grpo
    names = ", ".join(method.value for method in Method)
    return Method(typer.prompt(f"Algorithm ({names})", "grpo", type=Method, err=True))


def _ask(question: str) -> str:
    return str(typer.prompt(question, err=True)).strip()


def _ask_reward() -> str:
    question = (
        "Reward (FILE.py:FUNCTION, reward model, HOST:PORT; empty: a reward.py to start from)"
    )
    return str(typer.prompt(question, "", show_default=False, err=True)).strip()
