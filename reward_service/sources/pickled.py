"""Reward functions from a Python session: written by the driver, loaded by the reward service.

The file holds the function as bytes (cloudpickle, made by the driver), and beside them the lines of
the source it was written in, so that an error can show the user's own line where a notebook's cell
is no file. Reading it runs code, as loading ``file.py:function`` does: only runs of your own.
"""

from __future__ import annotations

import base64
import inspect
import json
import linecache
import pickle
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.contracts.errors import UserError

SUFFIX = ".function.json"


@dataclass(frozen=True, slots=True)
class PickledFunction:
    """``file``: the code's source as tracebacks name it; ``lines``: that source, may be empty."""

    function: bytes
    label: str
    file: str
    lines: tuple[str, ...]


def describe(function: Callable[..., Any], pickled: bytes) -> PickledFunction:
    """The record to be written for ``function``, which was pickled to ``pickled``."""
    code = _code(function)
    file = code.co_filename if code is not None else ""
    label = getattr(function, "__qualname__", "") or type(function).__qualname__
    return PickledFunction(pickled, label, file, tuple(linecache.getlines(file)) if file else ())


def write_pickled(path: Path, record: PickledFunction) -> None:
    fields = {**asdict(record), "function": base64.b64encode(record.function).decode("ascii")}
    path.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")


def load_pickled(path: Path, where: str) -> tuple[Callable[..., Any], PickledFunction]:
    """The function and its record. Raises UserError where the file or the function cannot be loaded
    in this process."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["function"] = base64.b64decode(fields["function"])
        record = PickledFunction(**{**fields, "lines": tuple(fields["lines"])})
    except FileNotFoundError:
        raise UserError("there is no such file", where=where, fix="start the run again") from None
    except Exception as error:
        raise UserError(
            f"is no reward function written by accord.train: {type(error).__name__}: {error}",
            where=where,
            fix="give file.py:function, or start the run again from Python",
        ) from None
    try:
        function = pickle.loads(record.function)
    except Exception as error:
        raise UserError(
            f"the reward {record.label!r} cannot be loaded in the reward service: "
            f"{type(error).__name__}: {error}",
            where=where,
            fix="let it use only what is installed or defined beside it, or give file.py:function",
        ) from error
    if record.lines and record.file not in linecache.cache:
        # No time stamp: linecache then never looks for a file to compare with.
        size = sum(map(len, record.lines))
        linecache.cache[record.file] = (size, None, list(record.lines), record.file)
    return function, record


def _code(function: Any) -> Any:
    function = inspect.unwrap(getattr(function, "func", function))  # functools.partial, decorators
    if not hasattr(function, "__code__"):
        function = type(function).__call__ if callable(function) else None
    return getattr(function, "__code__", None)
