"""Reads the files of a run directory, also while a run is writing them, and says what it left out.

Nothing here raises for a file that is missing or damaged: the trouble is recorded by file name, so
that the part of a report that needed the file can say so.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write_atomic(path: Path, text: str) -> None:
    """UTF-8; a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(text, "utf-8", newline="\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def number(record: Mapping[str, Any], key: str) -> float | None:
    """A finite number of the record, or None: a report shows what is there and invents nothing."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:  # JSON has integers of any size
        return None
    return found if math.isfinite(found) else None


class RunFiles:
    """The files of one run directory. ``missing`` and ``notes`` fill as files are asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.missing: list[str] = []
        self.notes: dict[str, list[str]] = {}

    def text(self, name: str) -> str | None:
        try:
            return (self.directory / name).read_text("utf-8", errors="surrogateescape")
        except FileNotFoundError:
            self.missing.append(name)
        except OSError as error:
            self.note(name, f"cannot be read: {error.strerror}")
        return None

    def json_object(self, name: str) -> Row | None:
        value = self._json(name)
        if value is not None and not isinstance(value, dict):
            self.note(name, "is not a JSON object")
            return None
        return value

    def json_list(self, name: str) -> list[Row] | None:
        value = self._json(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            self.note(name, "is not a list of JSON objects")
            return None
        return value

    def json_lines(self, name: str) -> list[Row] | None:
        """The objects of a file with one JSON object a line; other lines are left out and noted."""
        text = self.text(name)
        if text is None:
            return None
        rows = []
        lines = text.split("\n")
        for at, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            row = _parse(line)
            if isinstance(row, dict):
                rows.append(row)
            elif at == len(lines):
                self.note(name, "the last line is not complete yet (a run may be writing it)")
            else:
                self.note(name, f"line {at} is not a JSON object and is left out")
        return rows

    def metrics(self, name: str = "metrics.jsonl") -> list[Row] | None:
        """Rows by step, ascending. A step done again after a resume counts once: the last time."""
        rows = self.json_lines(name)
        if rows is None:
            return None
        by_step: dict[int, Row] = {}
        for row in rows:
            step = number(row, "step")
            if step is None:
                self.note(name, "a line has no step and is left out")
            else:
                by_step[int(step)] = row
        return [by_step[step] for step in sorted(by_step)]

    def note(self, name: str, text: str) -> None:
        known = self.notes.setdefault(name, [])
        if text not in known:
            known.append(text)

    def _json(self, name: str) -> Any:
        text = self.text(name)
        if text is None:
            return None
        value = _parse(text)
        if value is None:
            self.note(name, "is not valid JSON")
        return value


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
