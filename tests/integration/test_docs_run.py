"""The commands of README and of the first-run page do what their reader is told they do.

Every `accord` command of these pages is executed as it stands, in a folder that holds what the page
tells its reader to have: the files that the page shows, a model, prompts, and the two policies that
a quickstart leaves. Only the size of the training is cut. `tests/unit/test_docs.py` parses the
commands of all pages; those of `make`, `git` and `cp` are executed by nobody here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pages import blocks, commands, shown_files

ROOT = Path(__file__).resolve().parents[2]
README, FIRST_RUN, OPERATE = (
    ROOT / n for n in ("README.md", "docs/first-run.md", "docs/operate.md")
)
SMALL = (
    "batch.steps=2",
    "batch.prompts_per_step=2",
    "rollout.max_tokens=8",
    "logging.ray_metrics=false",
)
SERVES = ("ui",)  # until it is stopped; tests/browser starts it
FAMILIES = ("llama", "qwen2", "qwen3", "gemma", "mistral")
QUESTION = "how much does the kettle cost?\n"


def of_accord(*pages: Path) -> Iterator[list[str]]:
    """Arguments of the `accord` commands of the pages, each command once, whatever it overrides."""
    seen = set()
    for page in pages:
        for words in (words for block in blocks(page, "sh") for words in commands(block)):
            plain = tuple(word for word in words if "=" not in word or word.startswith("run.name="))
            if words[0] == "accord" and plain not in seen and words[1] not in SERVES:
                seen.add(plain)
                yield words[1:]


def prepare(folder: Path, model: Path, prompts: Path) -> None:
    """The folder as README's reader has it before the first command of "Use your model"."""
    for name, text in shown_files(README).items():
        (folder / name).write_text(text, encoding="utf-8")
    shutil.copy(prompts, folder / "prompts.jsonl")
    shutil.copytree(model, folder / "my-model")


# One process does what needs no process of its own: a dozen imports of torch cost half a minute.
IN_TURN = """
import contextlib, io, json, sys
commands, sys.argv[1:] = json.loads(sys.argv[1]), []
import launch
said = []
for words, typed in commands:
    sys.argv[1:], sys.stdin, code = words, io.StringIO(typed), 0
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            launch.main()
        except SystemExit as done:
            code = done.code
    said.append([code, out.getvalue()])
print(json.dumps(said))
"""


def in_turn(folder: Path, lines: list[list[str]]) -> list[str]:
    """What each command prints. They run one after another in one process."""
    typed = [(words, QUESTION if words[0] == "chat" else "") for words in lines]
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN, json.dumps(typed)],
        cwd=folder,
        env={**os.environ, "ACCORD_NO_BOOTSTRAP": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    failed = [words for words, (code, _) in zip(lines, results, strict=True) if code]
    assert not failed, f"{failed}: {done.stderr}"
    return [said for _, said in results]


def train(accord: Any, words: list[str]) -> None:
    command = accord.run(*words, *SMALL, timeout_s=240)
    assert command.process.returncode == 0, command.stderr


def test_the_pages_show_the_same_files() -> None:
    assert set(shown_files(README)) == {"reward.py", "grpo.toml"}
    assert shown_files(README).items() <= shown_files(FIRST_RUN).items()
    assert len(shown_files(README)["grpo.toml"].splitlines()) <= 12
    assert len(shown_files(README)["reward.py"].splitlines()) <= 3


@pytest.mark.slow
def test_the_commands_of_the_first_pages_run(accord: Any, world: Any) -> None:
    folder = accord.folder
    prepare(folder, world.policy, world.prompts)
    for place in ("policy", "sft/policy"):  # what `make quickstart` leaves, for `accord chat`
        shutil.copytree(world.policy, folder / "runs" / "quickstart" / place)
    lines = list(of_accord(README, FIRST_RUN))
    training = [words for words in lines if words[0] == "train"]
    assert len(training) == 1
    train(accord, training[0])
    run = folder / "runs" / "mine"
    assert (run / "policy" / "config.json").is_file()
    assert (run / "report.html").is_file()
    # A finished run is what the commands of the operate page want, too.
    shutil.copytree(run, folder / "runs" / "other")
    lines += [words for words in of_accord(OPERATE) if "--steps" not in words]  # it has two
    lines.remove(training[0])
    said = in_turn(folder, lines)
    assert {"plan", "chat", "samples", "status", "replay"} <= {words[0] for words in lines}
    assert [words for words, text in zip(lines, said, strict=True) if not text.strip()] == []
    assert "samples_per_prompt = 8" in said[lines.index(["plan", "grpo.toml"])]


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_use_your_model_with_each_family(family: str, accord: Any, world: Any) -> None:
    from learner.models.load import load_tokenizer
    from learner.models.tiny import fresh_model

    model = accord.folder / "fresh"
    tokenizer = load_tokenizer(str(world.policy))
    fresh_model(tokenizer, model, hidden=64, layers=2, heads=2, intermediate=64, arch=family)
    prepare(accord.folder, model, world.prompts)
    plan, training, chat = (
        words for words in of_accord(README) if {"grpo.toml", "runs/mine"} & set(words)
    )
    assert (plan[0], training[0], chat[0]) == ("plan", "train", "chat")
    in_turn(accord.folder, [plan])
    train(accord, training)
    assert in_turn(accord.folder, [chat])[0].strip()
