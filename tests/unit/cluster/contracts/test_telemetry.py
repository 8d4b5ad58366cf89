"""Off in every process that may import a library that reports, whoever started its cluster."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.contracts.telemetry import TELEMETRY_OFF, telemetry_off


def worker() -> None:
    from actors.environment import prepare_environment

    prepare_environment()


def learner() -> None:
    from learner.remote.actor import LearnerActor

    settings: Any = SimpleNamespace(host="127.0.0.1")
    LearnerActor(settings, (), 1)


def reward_service() -> None:
    from reward_service.remote import _RewardActor

    _RewardActor((), 1, None)


def command() -> None:
    from cluster.machine.environment import prepare_environment

    prepare_environment()


@pytest.mark.parametrize("role", [worker, learner, reward_service, command])
def test_no_role_reports(role: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        for name in (*os.environ, *TELEMETRY_OFF):  # all that the role sets is undone after it
            patch.setenv(name, os.environ.get(name, ""))
        for name in TELEMETRY_OFF:
            patch.delenv(name)
        patch.setenv("OMP_NUM_THREADS", "1")
        before = set(os.environ)
        role()
        assert {name: os.environ.get(name) for name in TELEMETRY_OFF} == TELEMETRY_OFF
        for name in set(os.environ) - before - set(TELEMETRY_OFF):
            del os.environ[name]


def test_who_wants_it_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    for name in set(TELEMETRY_OFF) - {"RAY_USAGE_STATS_ENABLED"}:
        monkeypatch.setenv(name, "")
    telemetry_off()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"
