"""The runs that `accord ui` shows, and what was read of them already.

A page costs what has changed since the last one. A run's files are read again when one of them has
another size or time, and of long files only a part.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from cluster.contracts.errors import UserError
from cluster.runs.history import FollowedHistory, History
from cluster.runs.overview import RunOverview, find_runs, live_status, overview
from cluster.runs.rows import Row, spread_rows
from learner.evaluation.run_files import number

POINTS = 1500  # rows of a long metrics.jsonl that a chart is made of
MOST_CACHED = 400  # runs whose line in the list is kept
MOST_OPEN = 8  # runs whose metrics and events are kept

Kept = TypeVar("Kept")


@dataclass(frozen=True, slots=True)
class Shelf:
    """A run in the library: ``key`` is its path within the folder, such as quick/ppo."""

    key: str
    path: Path


class Cache(Generic[Kept]):
    """What was made of files, for as long as they are the same; the last ``most`` of them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._found: OrderedDict[Path, tuple[object, Kept]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path, now: object, make: Callable[[], Kept]) -> Kept:
        """``now``: the signature of the files. ``make`` runs outside the lock, at times twice."""
        with self._lock:
            known = self._found.get(path)
            if known is not None and known[0] == now:
                self._found.move_to_end(path)
                return known[1]
        made = make()
        with self._lock:
            self._found[path] = (now, made)
            self._found.move_to_end(path)
            while len(self._found) > self._most:
                self._found.popitem(last=False)
        return made


class Library:
    """Runs of ``folder``, or of the one run ``only`` and its stages."""

    def __init__(self, folder: Path, only: Path | None = None) -> None:
        self.folder = folder
        self.only = only.name if only is not None else None
        self._overviews: Cache[RunOverview] = Cache(MOST_CACHED)
        self._rows: Cache[list[Row]] = Cache(MOST_OPEN)
        self._histories: dict[Path, FollowedHistory] = {}
        self._lock = threading.Lock()

    def shelves(self) -> list[Shelf]:
        """Newest first; the stages of a quickstart follow it."""
        found = [
            Shelf(path.relative_to(self.folder).as_posix(), path) for path in find_runs(self.folder)
        ]
        if self.only is not None:
            found = [one for one in found if one.key.split("/")[0] == self.only]
        outer = [one for one in found if "/" not in one.key][::-1]
        # A link in the folder is its owner's; one within a run may lead anywhere.
        inner = [one for one in found if "/" in one.key and not one.path.is_symlink()]
        return [
            one
            for first in outer
            for one in (first, *(s for s in inner if s.key.startswith(f"{first.key}/")))
        ]

    def shelf(self, key: str) -> Shelf | None:
        """None where there is no such run: a key is only ever compared, never made a path."""
        return next((one for one in self.shelves() if one.key == key), None)

    def overview(self, shelf: Shelf) -> RunOverview:
        """The status is looked up each time, as a process may have ended without a word."""
        names = ("manifest.json", "metrics.jsonl", "config.toml")
        now = tuple(signature(shelf.path / name) for name in names)
        made = self._overviews.get(
            shelf.path, now, lambda: overview(shelf.path, shelf.key, sized=False)
        )
        return live_status(made)

    def rows(self, path: Path) -> list[Row]:
        """Metrics, ascending by step; a step done again after a resume counts once. Of a long file
        some rows only."""
        file = path / "metrics.jsonl"
        return self._rows.get(path, signature(file), lambda: _by_step(file))

    def history(self, path: Path) -> History:
        with self._lock:
            if path not in self._histories and len(self._histories) >= MOST_OPEN:
                self._histories.pop(next(iter(self._histories)))
            followed = self._histories.setdefault(path, FollowedHistory(path))
            return followed.read().snapshot()


def library_of(place: Path) -> Library:
    """Of a run directory or a folder of them. Raises UserError where it is neither."""
    if (place / "manifest.json").is_file():
        run = place.resolve()
        return Library(run.parent, run)
    if not place.is_dir():
        raise UserError(
            "no such folder",
            where=str(place),
            fix="give a run directory, or the folder that holds them (run.dir in a config)",
        )
    return Library(place.resolve())


def _by_step(file: Path) -> list[Row]:
    by_step: dict[int, Row] = {}
    for row in spread_rows(file, POINTS):
        step = number(row, "step")
        if step is not None:
            by_step[int(step)] = row
    return [by_step[step] for step in sorted(by_step)]


def signature(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
