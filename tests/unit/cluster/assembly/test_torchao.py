"""Keys that need torchao, where it is not installed: told before anything starts."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from cluster.assembly.prepare import require_torchao
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import UserError


def config(**changes: Any) -> TrainConfig:
    given = {
        "model": {"path": "m"},
        "data": {"prompts": "p.jsonl"},
        "reward": {"sources": [{"type": "function", "path": "r.py:score"}]},
    }
    return TrainConfig.model_validate({**given, **changes})


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"learner": {"optimizer": "adamw8bit"}}, "learner.optimizer"),
        ({"lora": {"base": "8bit"}}, "lora.base"),
    ],
)
def test_the_key_is_named(
    changes: dict[str, Any], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match="needs torchao") as problem:
        require_torchao(config(**changes))
    assert problem.value.where == key
    # A cluster's hosts have packages of their own.
    require_torchao(config(**changes, cluster={"address": "10.0.0.1:6379"}))


def test_other_runs_need_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    require_torchao(config(lora={"rank": 4}))
