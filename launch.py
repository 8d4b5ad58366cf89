"""The command line: `accord COMMAND` and `python launch.py COMMAND` are the same.

A command is a function in the file of cluster/commands/ that has its name; it imports heavy things
inside itself, so that `--help` and a mistake in a config answer at once. To add a command, write
that file and add its name below.
"""

from __future__ import annotations

import bootstrap

bootstrap.reexec()

import atexit
import importlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from cluster.contracts import registry
from cluster.contracts.errors import AccordError, BadReward, Resumable, UserError
from cluster.contracts.plugins import plugins_from_environment
from cluster.machine.environment import prepare_environment
from cluster.machine.signals import TRY_AGAIN, WORDS, CommandSignals, command_signals, exit_code

COMMANDS = {  # heading in `accord --help` -> files of cluster/commands/
    "Start": ("quickstart", "init", "doctor"),
    "Train": ("sft", "reward_model", "dpo", "train", "pipeline"),
    "Sample and judge": (
        *("generate", "best_of_n", "ai_label", "constitution", "evaluate", "chat"),
        *("label", "preferences", "serve_reward"),
    ),
    "Look at a run": (
        *("runs", "status", "ui", "samples", "compare"),
        *("report", "lineage", "card", "replay", "audit", "dashboard"),
    ),
    "Steer a run": ("scale", "pause", "resume", "stop"),
    "Plan and measure": ("plan", "bench", "simulate"),
}


app = typer.Typer(
    name="accord",
    help="Reinforcement learning from human feedback: supervised fine-tuning, preferences, reward "
    "model, PPO and GRPO with vLLM on Ray, evaluation.\n\n"
    "Start with: accord quickstart",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from cluster.runs.provenance import version_lines

        print("\n".join(version_lines()))
        raise typer.Exit


@app.callback()
def accord(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=_show_version,
            help="Show the versions in use and exit.",
        ),
    ] = False,
) -> None:
    """Reads the options that stand before a command."""


def add_command(command: Callable[..., Any] | typer.Typer, heading: str) -> None:
    """Add a command named after its function (``serve_reward`` is `serve-reward`), or, for a Typer,
    a command with commands of its own, named after ``Typer(name=...)``."""
    if isinstance(command, typer.Typer):
        app.add_typer(command, rich_help_panel=heading)
    else:
        app.command(rich_help_panel=heading)(command)


for _heading, _names in COMMANDS.items():
    for _name in _names:
        add_command(getattr(importlib.import_module(f"cluster.commands.{_name}"), _name), _heading)


def _add_plugins() -> None:
    """Commands of the plugin files that ACCORD_PLUGINS names."""
    plugins_from_environment()
    own = {name.replace("_", "-") for names in COMMANDS.values() for name in names}
    for word in registry.COMMANDS:
        if word in own:
            raise UserError(
                f"registers the command {word!r}, which Accord has already",
                where=registry.COMMANDS.origin(word),
                fix="give its function another name",
            )
        add_command(registry.COMMANDS[word], "Plugins")


def main() -> None:
    """Entry point. Exit codes: see docs/operate.md."""
    prepare_environment()
    with command_signals() as signals:
        try:
            code = _run(signals)
        except KeyboardInterrupt:  # it came, or came again, when the command had just ended
            code = _interrupted(signals)
        signals.over()
        sys.stdout.flush()
        sys.stderr.flush()
        if code in (exit_code(signal.SIGINT), exit_code(signal.SIGTERM)):
            os._exit(code)  # background threads of libraries must not hold up the exit
    # The command is done. A Ctrl-C while Python unloads libraries must not change its exit code.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def _run(signals: CommandSignals) -> int:
    """Run the command; returns its exit code, after one line on stderr where it is not 0."""
    try:
        _add_plugins()
        # typer hands an Exit back as a number, and an interrupt as 130, instead of raising.
        code = int(app(prog_name="accord", standalone_mode=False) or 0)
    except (UserError, BadReward) as problem:  # an unusable reward is the reward's author's to mend
        _tell(f"error: {problem}")
        return 2
    except AccordError as problem:
        _tell(f"stopped: {problem}")
        return TRY_AGAIN if isinstance(problem, Resumable) else 1
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted(signals)
    except typer.Exit as done:
        return int(done.exit_code)
    except (Exception, SystemExit) as problem:
        # Libraries take other ways out when they meet a signal or what it did to their processes.
        if signals.heard() is not None:
            return _interrupted(signals, f" ({type(problem).__name__}: {problem})")
        if isinstance(problem, SystemExit):
            raise
        return _usage_code(problem)
    return _interrupted(signals) if code == exit_code(signal.SIGINT) else code


def _interrupted(signals: CommandSignals, detail: str = "") -> int:
    signals.over()
    number = signals.heard() or signal.SIGINT
    _tell(f"{WORDS[number]}{detail}")
    return exit_code(number)


def _tell(text: str) -> None:
    """One message on stderr. It may quote a prompt, a row or a file's name."""
    from cluster.runs.console import plain_text

    print(f"accord: {plain_text(text)}", file=sys.stderr)


def _usage_code(problem: Exception) -> int:
    """Wrong words on the command line are typer's to explain; all else is ours, shown whole."""
    show = getattr(problem, "show", None)
    if show is None:
        raise problem
    show()
    return int(getattr(problem, "exit_code", 2))


if __name__ == "__main__":
    main()
