"""A reward function of the user's own, loaded from ``file.py:function``.

It is called as TRL calls its reward functions, with lists by keyword, one entry an answer:

    def reward(prompts, completions, **columns) -> list[float]

``prompts`` and ``completions`` are strings for plain-text prompts; for chat prompts they are lists
of messages (``[{"role": "user", "content": ...}]``, ``[{"role": "assistant", "content": ...}]``).
``completion_ids`` holds the answers' token ids, and each column of the prompts' rows is there under
its own name (None where a row lacks it). A function that does not take ``**columns`` gets only what
its parameters name; a parameter without a default that a row has no column for is an error. Unlike
TRL, None as a reward is an error, and answers from several workers may share a call.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import linecache
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from cluster.contracts.chat import is_text
from cluster.contracts.config.reward import FunctionSource
from cluster.contracts.errors import BadReward, UserError
from cluster.contracts.records import Prompt
from reward_service.source import Part, ScoreItem, SourceContext, trial_items
from reward_service.sources.pickled import SUFFIX, load_pickled

GIVEN = ("prompts", "completions", "completion_ids")


log = logging.getLogger("accord.reward")


def make(source: FunctionSource, context: SourceContext) -> FunctionScorer:
    return FunctionScorer(source)


def check(source: FunctionSource, prompts: Sequence[Prompt]) -> None:
    """The file is run, as the service will run it, and the function is called once with the first
    prompt and two completions."""
    with contextlib.redirect_stdout(sys.stderr):  # what it prints is no result of the command
        scorer = FunctionScorer(source)
        try:
            for prompt in prompts:
                scorer.require_columns(prompt.metadata, prompt.where)
            scorer.score(trial_items(prompts))
        except BadReward as problem:
            fix = "mend the function; it must score any completion, an empty one too"
            raise UserError(str(problem), where=f"reward source {source.name!r}", fix=fix) from None


class FunctionScorer:
    """Calls the function; anything but one finite number a row is a BadReward naming the row."""

    type = "function"
    tokenizer = ""

    def __init__(self, source: FunctionSource) -> None:
        self.name = source.name
        loaded = _from_session(source) if source.path.endswith(SUFFIX) else _from_file(source)
        self._function, self._file, self._label = loaded.function, loaded.file, loaded.label
        self.content = loaded.content
        self._takes = inspect.signature(self._function).parameters
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in self._takes.values())

    def score(self, items: Sequence[ScoreItem]) -> list[Part]:
        parts: list[Part | None] = [None] * len(items)
        for text in (True, False):  # a call has one kind of prompt, as in TRL
            rows = [i for i, item in enumerate(items) if is_text(item.messages) is text]
            if rows:
                values = self._call([items[i] for i in rows])
                for row, value in zip(rows, values, strict=True):
                    parts[row] = Part(value)
        return [part for part in parts if part is not None]

    def _call(self, items: Sequence[ScoreItem]) -> list[float]:
        arguments = self._arguments(items)
        try:
            answer = self._function(**arguments)
        except (Exception, SystemExit) as error:
            log.debug("the reward function %s raised", self._label, exc_info=True)
            raise BadReward(
                f"the reward function {self._label} raised {self._cause(error)} "
                f"({self._culprit(items)})"
            ) from error
        return self._checked(answer, items)

    def _arguments(self, items: Sequence[ScoreItem]) -> dict[str, list[Any]]:
        text = is_text(items[0].messages)
        columns: dict[str, list[Any]] = {}
        for key in dict.fromkeys(key for item in items for key in item.metadata):
            columns[key] = [item.metadata.get(key) for item in items]
        columns["prompts"] = [
            item.messages[0]["content"] if text else [dict(m) for m in item.messages]
            for item in items
        ]
        columns["completions"] = [
            item.response if text else [{"role": "assistant", "content": item.response}]
            for item in items
        ]
        columns["completion_ids"] = [list(item.response_ids) for item in items]
        for item in items:
            self.require_columns(item.metadata, item.label)
        if self._takes_all:
            return columns
        return {key: values for key, values in columns.items() if key in self._takes}

    def require_columns(self, metadata: Mapping[str, Any], where: str) -> None:
        """Raise BadReward when a row lacks a column that the function cannot do without."""
        for name, parameter in self._takes.items():
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if not named or parameter.default is not parameter.empty or name in GIVEN:
                continue
            if name not in metadata:
                has = ", ".join(sorted(metadata)) or "no columns beside the prompt"
                raise BadReward(
                    f"the reward function {self._label} takes {name!r}, but the row of {where} has "
                    f"no such column; it has {has}"
                )

    def _checked(self, answer: Any, items: Sequence[ScoreItem]) -> list[float]:
        try:
            values = list(answer)
        except TypeError as error:
            raise BadReward(
                f"the reward function {self._label} returned a {type(answer).__name__}, not a list "
                f"of numbers (first: {items[0].label})"
            ) from error
        if len(values) != len(items):
            raise BadReward(
                f"the reward function {self._label} returned {len(values)} rewards for "
                f"{len(items)} completions (first: {items[0].label})"
            )
        numbers = []
        for item, value in zip(items, values, strict=True):
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = math.nan
            if isinstance(value, str) or not math.isfinite(number):
                raise BadReward(
                    f"the reward function {self._label} returned {value!r} for {item.label}; "
                    "a reward is one finite number"
                )
            numbers.append(number)
        return numbers

    def _cause(self, error: BaseException) -> str:
        """``Type: text, at file:line `code` ``, the last line of the user's own file."""
        text = f"{type(error).__name__}: {error}"
        frame, line = error.__traceback__, 0
        while frame is not None:
            if frame.tb_frame.f_code.co_filename == self._file:
                line = frame.tb_lineno
            frame = frame.tb_next
        if not line:
            return text
        code = linecache.getline(self._file, line).strip()
        return f"{text}, at {Path(self._file).name}:{line}" + (f" `{code}`" if code else "")

    def _culprit(self, items: Sequence[ScoreItem]) -> str:
        """Which row it was: each is tried alone, since the batch does not tell."""
        for item in items:
            try:
                self._function(**self._arguments([item]))
            except (Exception, SystemExit):  # the batch's own error is the one reported
                return item.label
        return f"a batch of {len(items)} items, first {items[0].label}; none of them fails alone"

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    """``file``: its source as tracebacks name it; ``content``: hash of all that decides scores."""

    function: Callable[..., Any]
    file: str
    label: str
    content: str


def _from_file(source: FunctionSource) -> _Loaded:
    file, label, name = _split(source.path, f"reward source {source.name!r}, key 'path'")
    function = _plain(_pick(_load(file, source.path), name, source.path), source.path)
    digest = hashlib.sha256(file.read_bytes())
    digest.update(f"\0{name}".encode())
    return _Loaded(function, str(file), label, digest.hexdigest())


def _from_session(source: FunctionSource) -> _Loaded:
    """A function or object given to ``accord.train``."""
    path = Path(source.path).expanduser().absolute()
    function, record = load_pickled(path, source.path)
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    return _Loaded(_plain(function, source.path), record.file, record.label, content)


def _plain(function: Callable[..., Any], where: str) -> Callable[..., Any]:
    called = function if inspect.isroutine(function) else type(function).__call__
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called):
        raise UserError("an async function cannot be a reward", where=where, fix="use a plain def")
    return function


def user_function(path: str, where: str) -> Callable[..., Any]:
    """The function that ``FILE.py:FUNCTION`` names. Raises UserError, at ``where``, for a path of
    another form or without a file, a file that cannot be loaded, a name that is not in it."""
    file, _, name = _split(path, where)
    return _pick(_load(file, path), name, path)


def _split(given: str, where: str) -> tuple[Path, str, str]:
    file, colon, function_name = given.rpartition(":")
    if not colon or not file.endswith(".py") or not function_name.isidentifier():
        raise UserError(
            f"{given!r} is not of the form file.py:function",
            where=where,
            fix='for example: path = "rewards.py:helpful"',
        )
    path = Path(file).expanduser().absolute()
    if not path.is_file():
        raise UserError(
            f"there is no file {path}",
            where=where,
            fix="a relative path starts from the directory the command is run in",
        )
    return path, f"{file}:{function_name}", function_name


def _load(file: Path, where: str) -> ModuleType:
    # At the end of the path, so that modules beside the file are found and none is shadowed.
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    name = f"accord_reward_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError("Python cannot load this file", where=where)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        raise UserError(
            f"loading it raised {type(error).__name__}: {error}",
            where=where,
            fix=f"`python {file}` should run without an error",
        ) from error
    return module


def _pick(module: ModuleType, name: str, where: str) -> Callable[..., Any]:
    names: Mapping[str, Any] = vars(module)
    function = names.get(name)
    if not callable(function):
        own = sorted(
            key
            for key, value in names.items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        )
        raise UserError(
            f"there is no function {name!r}", where=where, fix=f"it has: {', '.join(own)}"
        )
    result: Callable[..., Any] = function
    return result
