"""What several commands share: argument types, and what they do first and last.

Imports nothing heavy: `accord --help` imports every command.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cluster.contracts.errors import UserError

if TYPE_CHECKING:
    from cluster.runs.console import Reporter


def complete_run(incomplete: str) -> list[str]:
    """Shell completion: run directories in the folder written so far; without one, here and in
    runs/."""
    folder, slash, _ = incomplete.rpartition("/")
    places = [Path(folder or "/")] if slash else [Path(), Path("runs")]
    found = [str(p.parent) for place in places for p in sorted(place.glob("*/manifest.json"))]
    return [path for path in found if path.startswith(incomplete)]


RUN = {"metavar": "RUN", "autocompletion": complete_run}
_CONFIG = {"help": "TOML file; see examples/.", "metavar": "CONFIG.toml"}

Config = Annotated[Path, typer.Argument(**_CONFIG)]
OptionalConfig = Annotated[Path | None, typer.Argument(**_CONFIG)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings that replace the file's, such as batch.steps=50. "
        "KEY=none clears an optional setting. KEY=auto lets Accord choose the value.",
        metavar="KEY=VALUE",
    ),
]
Resume = Annotated[
    Path | None,
    typer.Option(
        **RUN,
        help="Continue this run from its newest checkpoint, without CONFIG.",
    ),
]
RunDirectory = Annotated[Path, typer.Argument(help="A run directory.", **RUN)]
Wait = Annotated[
    float,
    typer.Option("--wait", min=0, help="Most seconds to wait for what comes of the request."),
]
RunsFolder = Annotated[Path, typer.Option("--dir", help="Folder that holds the run directories.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only the result, no progress.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def load(model: Any, path: Path | None, overrides: list[str] | None, command: str) -> Any:
    """The config of type ``model``. Raises UserError when there is none, or it is wrong."""
    from cluster.contracts.config.file import load_config

    if path is None:
        raise UserError(
            "no config given", where=f"accord {command}", fix=f"accord {command} CONFIG.toml"
        )
    return load_config(model, str(path), overrides or [])


def resume_overrides(config: Path | None, overrides: list[str] | None) -> list[str]:
    """With --resume there is no CONFIG argument: the first word is an override."""
    return ([str(config)] if config else []) + (overrides or [])


def begin_or_resume(
    words: tuple[Path | None, list[str] | None, Path | None, bool],
    command: str,
    kind: Any,
    begin: Callable[[Any, Reporter], Path],
    again: Callable[[str, list[str], Reporter], Path],
) -> None:
    """A training command, whose ``words`` are (CONFIG, overrides, --resume RUN, --quiet): begin a
    run by a config of type ``kind``, or let RUN go on; print where it lies."""
    config, overrides, resume, quiet = words
    if resume is not None:
        path = again(str(resume), resume_overrides(config, overrides), reporter(quiet))
    else:
        path = begin(load(kind, config, overrides, command), reporter(quiet))
    print_path(path)


def fit_or_resume(
    words: tuple[Path | None, list[str] | None, Path | None, bool],
    command: Literal["sft", "reward-model", "dpo"],
    kind: Any,
) -> None:
    """``begin_or_resume`` of a command of offline training, which imports torch once its config is
    known to be right."""

    def begin(config: Any, reporter: Reporter) -> Path:
        from cluster.machine.imports import quick_imports

        with quick_imports():
            from cluster.assembly import offline
        runs: dict[str, Callable[..., Path]] = {
            "sft": offline.run_sft,
            "reward-model": offline.run_reward_model,
            "dpo": offline.run_dpo,
        }
        return runs[command](config, reporter)

    def again(path: str, overrides: list[str], reporter: Reporter) -> Path:
        from cluster.machine.imports import quick_imports

        with quick_imports():
            from cluster.assembly.offline import resume_offline
        return resume_offline(command, path, overrides, reporter)

    begin_or_resume(words, command, kind, begin, again)


def reporter(quiet: bool) -> Reporter:
    from cluster.machine.clock import command_began
    from cluster.runs.console import Reporter

    return Reporter(quiet=quiet, began=command_began())


def say_at_once(text: str, quiet: bool) -> None:
    """A line on stderr before the first import that takes seconds."""
    if not quiet:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def print_path(path: Path) -> None:
    """A command's result: where it lies."""
    from cluster.runs.console import result

    result(str(path))


def runs_in(directory: Path) -> list[Path]:
    """Run directories of a folder. Raises UserError when there are none."""
    from cluster.runs.overview import find_runs

    found = find_runs(directory)
    if not found:
        raise UserError(
            "holds no runs" if directory.is_dir() else "no such folder",
            where=str(directory),
            fix="give the folder that holds your run directories (run.dir in a config)",
        )
    return found
