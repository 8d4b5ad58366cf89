"""Line editing of `accord chat`: arrow keys, a history that lasts, completion of commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

HISTORY_LINES = 1000


def state_folder() -> Path:
    """Where the XDG base directories put what a program remembers."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "accord"


def history_file() -> Path:
    return state_folder() / "chat_history"


@contextmanager
def line_editing(words: Sequence[str]) -> Iterator[None]:
    """Within, ``input`` edits lines, and Tab completes ``words`` at the start of a line.

    Does nothing where Python was built without readline. A history that cannot be kept is said on
    stderr; the chat goes on.
    """
    try:
        import readline
    except ImportError:
        yield
        return
    path = history_file()
    readline.set_history_length(HISTORY_LINES)
    with suppress(OSError):  # none yet
        readline.read_history_file(path)
    readline.set_completer_delims(" ")
    readline.set_completer(lambda text, at: _completion(words, text, at))
    readline.parse_and_bind("tab: complete")
    try:
        yield
    finally:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)  # what people ask is theirs
            readline.write_history_file(path)
        except OSError as problem:
            sys.stderr.write(f"the history is not kept: {path}: {problem.strerror}\n")


def _completion(words: Sequence[str], text: str, at: int) -> str | None:
    found = [word for word in words if text and word.startswith(text)]
    return found[at] if at < len(found) else None
