"""The files that rewards read and write, by their paths. The driver packs what is read; the service
finds it on its own host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cluster.contracts.config.reward import FunctionSource, JudgeSource, SafetySource
from reward_service.judge.cache import ReplyCache

S = TypeVar("S", bound=Any)
Change = Callable[[str], str]


def with_paths(source: S, change: Change) -> S:
    """Every path that the source reads, of the folder for ``file.py:function``, as ``change`` gives
    it."""
    if isinstance(source, SafetySource):
        return _with_safety_paths(source, change)
    path = getattr(source, "path", None)  # a plugin's source may have one, too
    if not isinstance(path, str):
        return source
    place = Path(path).expanduser()
    if isinstance(source, FunctionSource) and ".py:" in place.name:
        return _with(source, path=str(Path(change(str(place.parent)), place.name)))
    return _with(source, path=change(path))


def _with_safety_paths(source: S, change: Change) -> S:
    rules = [
        rule if rule.words_file is None else _with(rule, words_file=change(rule.words_file))
        for rule in source.rules
    ]
    model = source.classifier
    if model is not None:
        model = _with(model, path=change(model.path))
    return _with(source, rules=rules, classifier=model)


def with_absolute_outputs(source: S) -> S:
    """The files that the source writes, where the command would: Ray's processes have a folder of
    their own."""
    for key in _outputs(source):
        path = Path(getattr(source, key)).expanduser().absolute()
        source = _with(source, **{key: str(path)})
    return source


def _outputs(source: Any) -> list[str]:
    written = {JudgeSource: "cache", SafetySource: "audit"}
    return [
        key for kind, key in written.items() if isinstance(source, kind) and getattr(source, key)
    ]


def add_known_answers(source: Any, here: Change) -> None:
    """Give a judge, whose cache lies on this host, the answers that the driver's cache held when
    the run began."""
    if isinstance(source, JudgeSource) and source.cache and here(source.cache) != source.cache:
        ReplyCache(source.cache).add_from(here(source.cache))


def _with(section: S, **changes: Any) -> S:
    return section.model_copy(update=changes)
