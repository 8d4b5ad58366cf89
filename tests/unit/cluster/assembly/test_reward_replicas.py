"""Reward services come, go and die; workers are told where those that serve listen."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from cluster.assembly import reward_replicas
from cluster.assembly.reward_replicas import RewardReplicas
from cluster.contracts.errors import Fatal, UserError


class Service:
    def __init__(self, number: int, problem: Exception | None = None) -> None:
        self.number, self.problem = number, problem
        self.address = f"10.0.0.{number}:7000"
        self.dies = asyncio.Event()
        self.restarts = 0
        self.stopped = False

    async def started(self) -> None:
        await asyncio.sleep(0)
        if self.problem is not None:
            raise self.problem

    async def death(self) -> str:
        await self.dies.wait()
        self.dies.clear()
        return "killed"

    async def restart(self) -> None:
        self.restarts += 1
        if self.restarts == 1:
            raise Fatal("died while it started")
        self.address = f"10.0.1.{self.number}:7000"

    def stop(self, timeout_s: float = 10.0) -> None:
        self.stopped = True


class World:
    def __init__(self, count: int, problems: dict[int, Exception] | None = None) -> None:
        self.services: list[Service] = []
        self.published: list[list[str]] = []
        self.events: list[dict[str, Any]] = []
        self.problems = problems or {}
        self.replicas = RewardReplicas(
            self.begin, count, lambda places: self.published.append(list(places))
        )

    def begin(self) -> Service:
        number = len(self.services)
        self.services.append(Service(number, self.problems.get(number)))
        return self.services[-1]

    def event(self, kind: str, **detail: Any) -> None:
        self.events.append({"kind": kind, **detail})

    async def until(self, reached: Callable[[], Any]) -> None:
        async with asyncio.timeout(20):
            while not reached():
                await asyncio.sleep(0.005)

    def last(self, kind: str) -> dict[str, Any]:
        return next((e for e in reversed(self.events) if e["kind"] == kind), {})


def play(
    script: Callable[[World], Awaitable[None]],
    count: int = 1,
    problems: dict[int, Exception] | None = None,
) -> None:
    async def run() -> None:
        world = World(count, problems)
        await world.replicas.ready()
        keeping = asyncio.ensure_future(world.replicas.keep_up(world.event))
        await asyncio.sleep(0)
        try:
            await script(world)
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    asyncio.run(run())


def test_they_are_scaled_and_one_that_leaves_is_taken_out_before_it_is_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reward_replicas, "NOTICED_S", 0.2)

    async def script(world: World) -> None:
        world.replicas.scale(3)
        await world.until(lambda: world.last("reward_replicas").get("serving") == 3)
        assert sorted(world.published[-1]) == [f"10.0.0.{n}:7000" for n in range(3)]
        world.replicas.scale(1)
        assert world.published[-1] == ["10.0.0.0:7000"]
        assert world.last("reward_replicas")["serving"] == 1
        assert not any(service.stopped for service in world.services)  # they still answer
        await world.until(lambda: [s.stopped for s in world.services] == [False, True, True])

    play(script)


def test_one_that_dies_is_left_out_until_it_serves_again() -> None:
    async def script(world: World) -> None:
        assert len(world.published[-1]) == 2
        world.services[0].dies.set()
        await world.until(lambda: world.published[-1] == ["10.0.0.1:7000"])
        await world.until(lambda: world.last("reward_service_restarted"))
        assert world.published[-1] == ["10.0.0.1:7000", "10.0.1.0:7000"]
        assert [e["cause"] for e in world.events if e["kind"] == "reward_service_lost"] == [
            "killed",
            "died while it started",
        ]
        assert world.replicas.deaths() == ["killed", "died while it started"]
        assert world.replicas.deaths(within_s=0.0) == []

    play(script, count=2)


def test_the_addresses_of_the_only_one_stay_while_it_is_away() -> None:
    async def script(world: World) -> None:
        world.services[0].dies.set()
        await world.until(lambda: world.last("reward_service_restarted"))
        assert world.published == [["10.0.0.0:7000"], ["10.0.1.0:7000"]]

    play(script)


def test_one_more_that_cannot_start_is_told_and_the_others_go_on() -> None:
    async def script(world: World) -> None:
        world.replicas.scale(2)
        await world.until(lambda: world.last("reward_replicas"))
        told = world.last("reward_replicas")
        assert (told["wanted"], told["serving"]) == (1, 1)
        assert "no room" in told["cause"]
        world.replicas.scale(2)  # asked for again, there is room
        await world.until(lambda: world.last("reward_replicas").get("serving") == 2)

    play(script, problems={1: UserError("no room")})


def test_they_are_kept_up_by_a_second_event_loop_as_well() -> None:
    """A run that goes back to a checkpoint drives the same services in another event loop."""
    world = World(2)

    async def run() -> None:
        for service in world.services:
            service.dies = asyncio.Event()
        await world.replicas.ready()
        assert world.published[-1] == ["10.0.0.0:7000", "10.0.0.1:7000"]
        keeping = asyncio.ensure_future(world.replicas.keep_up(world.event))
        await asyncio.sleep(0.01)
        assert not keeping.done()
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)

    for _ in range(2):
        asyncio.run(run())
