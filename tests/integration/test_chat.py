"""`accord chat` at a real terminal (a pty) with a real model: what a person types and sees."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Each test starts processes that load transformers.
pytestmark = [pytest.mark.slow, pytest.mark.parallel]
ROOT = Path(__file__).resolve().parents[2]
CTRL_C, UP = "\x03", "\x1b[A"

PROMPT = r"\n> \Z"


class Terminal:
    """A command with a terminal of its own. ``seen``: all it has written, control codes removed."""

    def __init__(self, words: list[str], environment: dict[str, str]) -> None:
        self._mine, its = pty.openpty()
        self.process = subprocess.Popen(
            words, stdin=its, stdout=its, stderr=its, env=environment, start_new_session=True,
            preexec_fn=take_terminal,
        )  # fmt: skip
        os.close(its)
        self.seen = ""
        self.pieces: list[tuple[float, str]] = []

    def type(self, text: str) -> None:
        os.write(self._mine, text.encode())

    def expect(self, pattern: str, within_s: float = 60.0) -> str:
        """Wait for the pattern in what has come since the last one; returns that."""
        deadline = time.monotonic() + within_s
        start = getattr(self, "_from", 0)
        while not (found := re.search(pattern, self.seen[start:])):
            left = deadline - time.monotonic()
            assert left > 0, f"no {pattern!r} within {within_s} s in:\n{self.seen[start:]}"
            self._read(left)
        self._from = start + found.end()
        return self.seen[start : self._from]

    def _read(self, within_s: float) -> None:
        if not select.select([self._mine], [], [], within_s)[0]:
            return
        try:
            data = os.read(self._mine, 4096).decode(errors="replace")
        except OSError:  # the other side is closed
            data = ""
        assert data, f"the command ended:\n{self.seen}"
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", data)
        self.pieces.append((time.monotonic(), text))
        self.seen += text

    def leave(self) -> None:
        """Ctrl-C at the prompt, pressed as a person would: again, if the first one came between the
        prompt and the moment from which readline waits for keys (it sees that one too late)."""
        deadline = time.monotonic() + 30
        while self.process.poll() is None and time.monotonic() < deadline:
            self.type(CTRL_C)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(3.0)
        assert self.process.poll() == 0

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10.0)
        os.close(self._mine)


def take_terminal() -> None:
    """In the new session: its standard input becomes its controlling terminal, so that Ctrl-C is a
    signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights with room for long answers."""
    from learner.models.tiny import fresh_model, train_tokenizer

    folder = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = train_tokenizer(["how long does it last"] * 3, 320, folder)
    fresh_model(tokenizer, folder, hidden=64, layers=4, heads=2, intermediate=64)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    return folder


@pytest.fixture
def chat(model: Path, tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(
        [sys.executable, str(ROOT / "launch.py"), "chat", str(model), "--max-tokens", "8"],
        {**os.environ, "XDG_STATE_HOME": str(tmp_path), "ACCORD_NO_BOOTSTRAP": "1",
         "TERM": "xterm", "COLUMNS": "200"},
    )  # fmt: skip
    yield terminal
    terminal.close()


def test_a_conversation_at_a_terminal(chat: Terminal, tmp_path: Path) -> None:
    chat.expect(r"loading \.\.\.", within_s=10.0)
    chat.expect("Ctrl-D leaves")
    chat.expect(PROMPT)

    chat.type("how long\n")
    chat.expect(r"cut after 8 tokens")
    chat.expect(PROMPT)  # before it, the terminal itself would take what is typed
    chat.type(UP)  # line editing: the question comes back, and can be sent again
    chat.expect("how long")
    chat.type(" does it\n")
    chat.expect(r"cut after 8 tokens")
    chat.expect(PROMPT)
    chat.type("/show\n")
    assert chat.expect(r"you: how long does it\n").count("you: how long") == 2

    chat.expect(PROMPT)
    chat.type("/system Be brief.\n")
    chat.expect(r"\(system message set\)")
    chat.expect(PROMPT)
    chat.type("/he\t\n")  # completed
    chat.expect(r"/undo\s+forget the last")

    chat.expect(PROMPT)
    chat.type("/set max_tokens 4000\n")
    chat.expect(r"max_tokens 4000")
    chat.expect(PROMPT)
    chat.type("last\n")
    chat.expect("last\n")
    began = len(chat.pieces)
    deadline = time.monotonic() + 60
    while len(chat.pieces) < began + 12:  # the answer comes piece by piece
        chat._read(deadline - time.monotonic())
    assert chat.pieces[-1][0] > chat.pieces[began + 1][0]
    chat.type(CTRL_C)
    chat.expect(r"\(stopped\)", within_s=5.0)
    chat.expect(PROMPT)
    chat.leave()
    history = (tmp_path / "accord" / "chat_history").read_text().splitlines()
    assert history[:3] == ["how long", "how long does it", "/show"]
    assert (tmp_path / "accord" / "chat_history").stat().st_mode & 0o077 == 0


def test_questions_are_piped_to_two_models_and_answers_are_scored(world: Any) -> None:
    piped = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "chat", str(world.policy), "--before",
         str(world.policy), "--reward", str(world.reward_model), "--temperature", "0",
         "--max-tokens", "4"],
        input="how long\nlast\n", capture_output=True, text=True, timeout=120,
        env={**os.environ, "ACCORD_NO_BOOTSTRAP": "1"},
    )  # fmt: skip
    assert piped.returncode == 0, piped.stderr
    lines = piped.stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines if ": " in line] == ["before", "after"] * 2
    scores = [line for line in lines if line.startswith("(score ")]
    assert len(scores) == 4
    assert scores[0] == scores[1]  # the same model, greedily
