"""The public names of `import accord`, and what it refuses before anything starts."""

from __future__ import annotations

import inspect
import types
from pathlib import Path
from typing import Any

import pytest

import accord


def test_every_public_name_is_there_and_nothing_else_is_public() -> None:
    assert sorted(set(accord.__all__)) == sorted(accord.__all__)
    missing = [name for name in accord.__all__ if not hasattr(accord, name)]
    assert missing == []
    own = {
        name
        for name, value in vars(accord).items()
        if isinstance(value, types.FunctionType) and value.__module__ == "accord"
    }
    assert own <= set(accord.__all__)


def test_every_public_function_says_what_it_does_and_is_typed() -> None:
    for name in accord.__all__:
        value = getattr(accord, name)
        if not inspect.isfunction(value):
            continue
        assert value.__doc__, name
        signature = inspect.signature(value)
        bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
        assert bare == [], name
        assert signature.return_annotation is not signature.empty, name


def reward(completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accord.train(), "missing key model"),
        (lambda: accord.train("m", ["a"]), "missing key reward"),
        (lambda: accord.train("m", ["a"], reward, algorithm="gpro"), "unknown algorithm 'gpro'"),
        (lambda: accord.train("m", [], reward), "prompts: holds no rows"),
        (lambda: accord.train("m", ["a"], reward, config={"learner.lrr": 1}), "unknown key"),
        (lambda: accord.train("m", ["a"], reward, steps=0), "batch.steps = 0"),
        (lambda: accord.train("./none", ["a"], reward), "no such model directory"),
        (lambda: accord.train("m", ["a"], 3), "3 is no reward"),
        (lambda: accord.train("m", ["a"], reward, config="none.toml"), "no such config file"),
        (lambda: accord.train("m", ["a"], reward, callbacks=["x"]), "'x' is no callback"),
        (lambda: accord.train("m", ["a"], reward, name="../evil"), "name of one folder"),
        (lambda: accord.sft("m", [{"text": object()}]), r"data\[0\]: cannot be written"),
        (lambda: accord.load_run("none"), "not a run directory"),
        (lambda: accord.resume("none"), "not a run directory"),
        (lambda: accord.plan({"learner.lrr": 1}), "accord.plan: "),
    ],
)
def test_a_mistake_is_one_clear_error_and_leaves_nothing(
    call: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(accord.UserError, match=message):
        call()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
