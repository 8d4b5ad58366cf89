"""Nodes that are about to go: workers there are drained in time, other roles are saved."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import pytest

from cluster.assembly import leaving
from cluster.assembly.leaving import LeavingWatch
from cluster.machine.draining import LeavingNode

SPOT = LeavingNode("n1", "host2", "10.0.0.2", 30.0)
CALM = LeavingNode("n2", "host3", "10.0.0.3", math.inf)
SUDDEN = LeavingNode("n3", "host4", "10.0.0.4", 0.5)


class Pool:
    def __init__(self) -> None:
        self.drained: list[tuple[str, float]] = []

    async def drain(self, who: str, deadline_s: float) -> int:
        self.drained.append((who, deadline_s))
        return 1


def watched(
    answers: Sequence[Sequence[LeavingNode] | Exception], home: dict[str, list[str]]
) -> tuple[Pool, list[dict[str, Any]], int]:
    pool, events, saves = Pool(), list[dict[str, Any]](), []
    left = list(answers)

    def ask() -> Sequence[LeavingNode]:
        answer = left.pop(0) if left else []
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def run() -> None:
        watch = LeavingWatch(
            pool,
            lambda kind, **detail: events.append({"kind": kind, **detail}),
            lambda node: home.get(node.id, []),
            lambda: saves.append(1),
            ask,
        )
        task = asyncio.ensure_future(watch.run())
        for _ in range(2000):
            await asyncio.sleep(0.005)
            if not left:
                break
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    return pool, events, len(saves)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "LOOK_S", 0.01)


def test_each_node_is_taken_off_once_before_its_deadline() -> None:
    pool, events, saves = watched([[], [SPOT], [SPOT, CALM], [SPOT, CALM, SUDDEN]], {})
    assert pool.drained == [("n1", 25.0), ("n2", 600.0), ("n3", 1.0)]
    assert [(e["node"], e["seconds_left"]) for e in events] == [
        ("host2", 30.0),
        ("host3", None),
        ("host4", 0.5),
    ]
    assert saves == 0


def test_a_checkpoint_is_asked_for_where_learner_or_rewards_run() -> None:
    pool, events, saves = watched([[SPOT, CALM]], {"n1": ["learner"]})
    assert saves == 1
    assert events[0]["roles"] == ["learner"]
    assert len(pool.drained) == 2


def test_a_head_that_does_not_answer_ends_the_watch_and_not_the_run() -> None:
    pool, events, _ = watched([[SPOT], RuntimeError("gone"), [CALM]][:2], {})
    assert len(pool.drained) == 1
    assert events[-1] == {"kind": "leaving_nodes_unknown", "cause": "RuntimeError('gone')"}
