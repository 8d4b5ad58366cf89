"""What a person sees while a command works: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

SHOWN = {  # metric -> (label, format), in the order shown
    "train/loss": ("loss", "{:.3f}"),
    "eval/loss": ("eval loss", "{:.3f}"),
    "rm/accuracy": ("accuracy", "{:.3f}"),
    "rewards/accuracies": ("accuracy", "{:.3f}"),
    "train/accuracy": ("accuracy", "{:.3f}"),
    "rewards/margins": ("margin", "{:.3f}"),
    "train/margin": ("margin", "{:.3f}"),
    "objective/scores": ("reward", "{:+.3f}"),
    "objective/kl": ("kl", "{:.2f}"),
    "completions/mean_length": ("len", "{:.0f}"),
    "perf/throughput": ("tok/s", "{:.0f}"),
    "perf/tokens_per_s": ("tok/s", "{:.0f}"),
    "async/staleness_mean": ("stale", "{:.2f}"),
}


class Reporter:
    """Progress of named stages. Everything goes to stderr; stdout is for results."""

    def __init__(self, *, quiet: bool = False, began: float | None = None) -> None:
        """``began``: when the command was given, in monotonic seconds; None: now."""
        self.began = time.monotonic() if began is None else began
        self._console = Console(stderr=True, highlight=False, markup=False)
        self.live = self._console.is_terminal and not quiet
        self.quiet = quiet

    def say(self, text: str) -> None:
        """One line for people; control characters cannot reach the terminal."""
        if not self.quiet:
            self.tell(text)

    def tell(self, text: str) -> None:
        """As ``say``, also with --quiet: for what must be known to go on."""
        self._console.print(Text(plain_text(text)), soft_wrap=True)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        bar = _bar(self._console) if self.live else None
        stage = Stage(self, name, total, bar)
        if bar is None:
            self.say(f"{name} ...")
            yield stage
        else:
            with bar:
                stage.show({})
                yield stage
        self.say(f"{name}: done in {time.monotonic() - stage.began:.0f} s{stage.summary()}")


class Stage:
    """One bar, or a plain line at most every few seconds. Also a metrics sink (``write``)."""

    def __init__(
        self, reporter: Reporter, name: str, total: int | None, bar: Progress | None
    ) -> None:
        self.began = time.monotonic()
        self._reporter = reporter
        self._name = name
        self._total = total
        self._bar = bar
        self._task: TaskID | None = None
        self._last_line = 0.0
        self._text = ""
        self._first: tuple[int, float] | None = None  # steps done at the first update, and when
        if bar is not None:
            self._task = bar.add_task(name, total=total, numbers="")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self.update(step, numbers)

    def update(self, done: int, numbers: Mapping[str, float], total: int | None = None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = done, now
        self._total = total or self._total
        self._text = shown(numbers) or self._text
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=self._total, numbers=self._text)
            return
        if now - self._last_line >= 5.0 or done == self._total:
            self._last_line = now
            of = f"/{self._total}" if self._total else ""
            self._reporter.say(f"  {self._name} {done}{of}  {self._text}{self._left(done, now)}")

    def show(self, numbers: Mapping[str, float]) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, numbers=shown(numbers))

    def summary(self) -> str:
        return f"  ({self._text})" if self._text else ""

    def close(self) -> None:
        """Nothing to close: the context manager ends the bar."""

    def _left(self, done: int, now: float) -> str:
        """Time left, from the steps after the first: whatever came before that was the start."""
        first, since = self._first or (done, now)
        if not self._total or done <= first or done >= self._total:
            return ""
        seconds = (now - since) / (done - first) * (self._total - done)
        return f"  left {int(seconds // 60)}:{int(seconds % 60):02d}"


def shown(numbers: Mapping[str, Any]) -> str:
    parts: dict[str, str] = {}
    for name, (label, style) in SHOWN.items():
        if name in numbers and label not in parts:
            parts[label] = style.format(numbers[name])
    return "  ".join(f"{label} {text}" for label, text in parts.items())


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[numbers]}", markup=False),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        refresh_per_second=4,
    )


def plain_text(text: str) -> str:
    """No character that moves the cursor, colours, or turns the direction of a terminal's text."""
    return "".join(
        c if c == "\n" or c == "\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}"
        for c in text
    )


def result(text: str) -> None:
    """A command's result on stdout."""
    sys.stdout.write(plain_text(text) + "\n")
    sys.stdout.flush()
