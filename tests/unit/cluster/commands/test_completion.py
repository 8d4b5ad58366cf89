"""Shell completion in a real bash, with the script that `--install-completion` would install."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.commands.options import complete_run

ACCORD = Path(sys.executable).with_name("accord")
COMPLETE = """
eval "$(accord --show-completion bash)"
for line in "$@"; do
    COMP_LINE="$line" COMP_POINT=${#line}
    read -ra COMP_WORDS <<< "$line"
    [[ "$line" == *" " ]] && COMP_WORDS+=("")
    COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
    _accord_completion accord
    echo "${COMPREPLY[@]}"
done
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for run in ("runs/first", "runs/first/ppo", "runs/second", "here"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "manifest.json").write_text("{}")
    (tmp_path / "runs/no-run").mkdir()
    return tmp_path


@pytest.mark.skipif(shutil.which("bash") is None or not ACCORD.exists(), reason="bash, accord")
def test_bash_completes_commands_options_and_run_directories(folder: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", COMPLETE, "x",
         "accord rep", "accord train --re", "accord report runs/f", "accord train --resume runs/s",
         "accord status runs/f",
         "accord compare runs/first runs/s"],
        cwd=folder,
        env={**os.environ, "PATH": f"{ACCORD.parent}:{os.environ['PATH']}", "SHELL": "bash",
             "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    expected = [
        "report replay",
        "--resume",
        "runs/first",
        "runs/second",
        "runs/first",
        "runs/second",
    ]
    assert done.stdout.splitlines() == expected, done.stderr


def test_run_directories_are_found_where_the_word_points(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert complete_run("") == ["here", "runs/first", "runs/second"]
    assert complete_run("r") == ["runs/first", "runs/second"]
    assert complete_run("runs/first/") == ["runs/first/ppo"]
    assert complete_run(f"{folder}/h") == [f"{folder}/here"]
    assert complete_run("elsewhere/x") == []
