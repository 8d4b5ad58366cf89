"""The command line as a whole: its list, its help, and how fast it answers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import launch

ROOT = Path(__file__).resolve().parents[4]
LIST_WIDTH = 61  # columns that `accord --help` leaves for what a command does
HEAVY = "torch ray vllm grpc transformers numpy pyarrow pydantic datasets scipy matplotlib"


def all_commands(command: Any, path: str = "accord") -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from all_commands(inner, f"{path} {name}")


COMMANDS = dict(all_commands(typer.main.get_command(launch.app)))


def test_every_file_of_the_folder_is_in_the_list() -> None:
    files = {p.stem for p in (ROOT / "cluster/commands").glob("*.py")} - {"__init__", "options"}
    assert files == {name for names in launch.COMMANDS.values() for name in names}


def test_help_of_everything_needs_nothing_heavy() -> None:
    """Importing launch is all that `--help` does before it prints."""
    code = f"import sys, launch; print(sorted(set('{HEAVY}'.split()) & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize("path", [p for p, c in COMMANDS.items() if not hasattr(c, "commands")])
def test_each_command_has_an_example_that_names_it(path: str) -> None:
    text = COMMANDS[path].help or ""
    assert f"Example: `{path}" in text


@pytest.mark.parametrize("path", COMMANDS)
def test_each_help_fits_a_screen_and_its_first_line_a_line_of_the_list(path: str) -> None:
    words = [*path.split()[1:], "--help"]
    done = CliRunner().invoke(launch.app, words, env={"COLUMNS": "80"})
    assert len(done.output.splitlines()) <= (70 if path == "accord" else 40)
    first = (COMMANDS[path].help or "").partition("\n\n")[0]
    assert path == "accord" or len(first) <= LIST_WIDTH, first


@pytest.mark.parametrize("path", COMMANDS)
def test_each_argument_and_option_is_explained(path: str) -> None:
    silent = [p.name for p in COMMANDS[path].params if not getattr(p, "help", None)]
    assert silent == []
