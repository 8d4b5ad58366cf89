"""What the stages of a pipeline share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from cluster.pipeline import work
from cluster.pipeline.work import Work

ORDER = ("sft", "sample", "reward_model", "policy", "evaluate")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is started, ended and done, in order."""
    told: list[str] = []

    @contextmanager
    def shared(name: str) -> Iterator[None]:
        told.append(f"{name} starts")
        yield
        told.append(f"{name} ends")

    class Trainings:
        def __init__(self, *words: Any) -> None: ...

        def cluster(self, at: Any) -> None: ...

        def do(self, name: str, at: Any) -> None:
            told.append(name)

    trainings: Any = ModuleType("cluster.pipeline.trainings")
    trainings.Trainings = Trainings
    monkeypatch.setitem(sys.modules, "cluster.pipeline.trainings", trainings)
    monkeypatch.setattr(work, "quick_imports", nullcontext)
    monkeypatch.setattr(work, "ray_cluster", lambda config: shared("Ray"))
    monkeypatch.setattr(work, "forked_roles", lambda config: shared("the fork server"))
    return told


def pipeline(policy_stage: str = "train") -> Work:
    config: Any = SimpleNamespace(policy_stage=policy_stage, cluster=None)
    run: Any = SimpleNamespace(path="")
    return Work(config, run, work.Reporter(quiet=True))


def test_ray_and_the_imports_of_vllm_start_once(told: list[str]) -> None:
    stages = pipeline()
    at: Any = None
    for _ in range(2):
        for name in ORDER:
            stages.do(name, at, at)  # type: ignore[arg-type]
    stages.close()
    starts = ["the fork server starts", "Ray starts"]
    ends = ["Ray ends", "the fork server ends"]
    assert told == ["sft", *starts, *ORDER[1:], *ORDER, *ends]


def test_stages_without_ray_start_none(told: list[str]) -> None:
    stages = pipeline("dpo")
    at: Any = None
    for name in ("sft", "reward_model", "policy"):
        stages.do(name, at, at)
    stages.close()
    assert told == ["sft", "reward_model", "policy"]
