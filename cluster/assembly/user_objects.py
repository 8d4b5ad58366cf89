"""The user's own objects (models, rows, reward functions) as the files that a config can name.

They are written into the run's own directory, under ``inputs/``, before anything starts: the run is
then like one made from files, and can be resumed, replayed and evaluated from the command line.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.contracts.config.base import Section
from cluster.contracts.config.reward import FunctionSource, RewardModelSource
from cluster.contracts.errors import UserError
from cluster.runs.mirror import folder_of
from cluster.runs.run import INPUTS, name_by_time

Rows = Iterable[Any]


class Inputs:
    """Writes objects below one folder, which is made when the first is written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()  # a resumed run may be started elsewhere

    def model(self, given: Any, tokenizer: Any, key: str) -> str:
        """Path of a model: the path given, or that of the transformers model written here."""
        if isinstance(given, str | Path):
            if tokenizer is not None:
                raise UserError(
                    "is a path, which has its own tokenizer; a tokenizer was given as well",
                    where=key,
                    fix="leave tokenizer out, or give the loaded model object",
                )
            return str(given)
        if not hasattr(given, "save_pretrained") or not hasattr(given, "generation_config"):
            raise UserError(
                f"is a {type(given).__name__}, neither a path nor a transformers language model",
                where=key,
                fix="give a model directory, a hub id, or a loaded AutoModelForCausalLM",
            )
        if tokenizer is None:
            raise UserError(
                "is a loaded model without a tokenizer", where=key, fix="give tokenizer=... as well"
            )
        from learner.models.load import save_policy

        return str(save_policy(given, tokenizer, self._room() / key))

    def rows(self, given: str | Path | Rows, key: str, column: str) -> str:
        """Path of rows: the path given, or that of a JSONL file written here. A text becomes the
        column ``column``, a list of messages too; a mapping is a row as it stands."""
        if isinstance(given, str | Path):
            return str(given)
        lines = [
            _line(_row(item, column), f"{key}[{at}]") for at, item in enumerate(_items(given, key))
        ]
        if not lines:
            raise UserError("holds no rows", where=key, fix="give at least one")
        path = self._room() / f"{key}.jsonl"
        path.write_text("".join(lines), encoding="utf-8")
        return str(path)

    def function(self, given: Callable[..., Any], name: str) -> str:
        """Path of a reward function or object, written here with its code."""
        from cluster.machine.pickling import pickled
        from reward_service.sources.pickled import SUFFIX, describe, write_pickled

        path = self._room() / f"{name}{SUFFIX}"
        write_pickled(path, describe(given, pickled(given, f"reward {name!r}")))
        return str(path)

    def _room(self) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder


@contextmanager
def inputs_of_run(directory: str, name: str, command: str) -> Iterator[tuple[str, Inputs]]:
    """(name of the run, where its inputs go). They are removed when no run came of it."""
    label = name or name_by_time(command)
    path = folder_of(f"{directory}/{label}")
    if path.exists():  # said again, and better, by Run.create; nothing of another run is touched
        raise UserError(
            "the run directory exists",
            where=str(path),
            fix="choose another name, remove it, or continue it with accord.resume",
        )
    try:
        yield label, Inputs(path / INPUTS)
    finally:
        if path.is_dir() and not (path / "manifest.json").exists():
            shutil.rmtree(path)


@contextmanager
def temporary_inputs() -> Iterator[Inputs]:
    """For a call that leaves no run behind."""
    with tempfile.TemporaryDirectory(prefix="accord-") as folder:
        yield Inputs(Path(folder))


def load_trained(directory: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a model directory."""
    from cluster.contracts.config.base import ModelConfig
    from learner.models.load import load_policy, load_tokenizer

    config = ModelConfig(path=str(directory))
    return load_policy(config), load_tokenizer(config)


def reward_sources(given: Any, inputs: Inputs) -> list[Mapping[str, Any]]:
    """The trees of ``reward.sources`` for one reward or several.

    A reward is a function or callable object, ``"file.py:function"``, the directory of a reward
    model, or a config source (an object such as ``FunctionSource``, or its tree).
    """
    several = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not several:
        raise UserError("holds no reward", where="reward", fix="give at least one")
    found: list[Mapping[str, Any]] = []
    for one in several:
        tree = dict(_source(one, inputs, {str(tree["name"]) for tree in found}))
        found.append(tree)
    return found


def _source(given: Any, inputs: Inputs, taken: set[str]) -> Mapping[str, Any]:
    if isinstance(given, Section):
        return given.model_dump()
    if isinstance(given, Mapping):
        return {"name": given.get("type", "reward"), **given}
    if isinstance(given, str | Path):
        path = str(given)
        if ".py:" in path:
            name = _free(path.rpartition(":")[2], taken)
            return FunctionSource(path=path, name=name).model_dump()
        return RewardModelSource(path=path, name=_free("model", taken)).model_dump()
    if callable(given) and not isinstance(given, type):
        name = _free(_name_of(given), taken)
        return FunctionSource(path=inputs.function(given, name), name=name).model_dump()
    raise UserError(
        f"{given!r} is no reward",
        where="reward",
        fix='give a function, "file.py:function", a reward model\'s directory, or a config source',
    )


def _name_of(given: Any) -> str:
    name = str(getattr(given, "__name__", "") or type(given).__name__)
    return name if name.isidentifier() else "reward"  # "<lambda>"


def _free(name: str, taken: set[str]) -> str:
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free


def _items(given: Rows, key: str) -> Iterable[Any]:
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise UserError(
            f"is a {type(given).__name__}, neither a path nor a list of rows",
            where=key,
            fix="give a path, or a list of texts, messages or rows",
        )
    return given


def _row(item: Any, column: str) -> Any:
    return item if isinstance(item, Mapping) else {column: item}


def _line(row: Any, where: str) -> str:
    try:
        return json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as problem:
        raise UserError(
            f"cannot be written as JSON: {problem}",
            where=where,
            fix="give texts, lists of messages, or rows of texts, numbers, lists and dicts",
        ) from None
