"""What the pool does with groups, weights and workers that misbehave; in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import pytest

from cluster.contracts.errors import Fatal, Retryable, WorkersGone
from cluster.contracts.records import (
    Assignment,
    GroupMeta,
    Harvest,
    Prompt,
    SwapReport,
    WeightManifest,
)
from cluster.loop.pool import WorkerPool
from cluster.loop.settings import PoolSettings
from cluster.measure.simulation.loop import VirtualClock, VirtualLoop
from cluster.measure.simulation.roles import manifest

T = TypeVar("T")
FOREVER_S = 1e6


class Worker:
    """Does as it is told: ``finish`` hands in a group, the attributes make it slow or hang."""

    def __init__(self, index: int, incarnation: int) -> None:
        self.name, self.incarnation = f"w{index}", incarnation
        self.start_s = self.submit_s = self.load_s = 0.0
        self.given: list[Assignment] = []
        self.loaded: list[int] = []
        self.lost: Retryable | None = None
        self.hangs = False
        self.stopped = False
        self._done: list[GroupMeta] = []

    async def placed(self) -> None: ...

    async def start(self) -> Mapping[str, Any]:
        await asyncio.sleep(self.start_s)
        return {"engine": "scripted"}

    async def submit(self, assignments: Sequence[Assignment]) -> None:
        assert self.loaded, "given work before it had weights"
        await asyncio.sleep(self.submit_s)
        self.given += assignments

    async def load_weights(self, manifest: WeightManifest) -> SwapReport:
        await asyncio.sleep(self.load_s)
        self.loaded.append(manifest.version)
        seconds = dict.fromkeys(("fetch_s", "verify_s", "stage_s", "pause_s", "prove_s"), 0.0)
        return SwapReport(version=manifest.version, canary_logp_diff=0.0, **seconds)

    async def harvest(self, timeout_s: float) -> Harvest:
        if self.hangs:
            await asyncio.sleep(FOREVER_S)
        for _ in range(10):
            await asyncio.sleep(timeout_s / 10)
            if self.lost is not None:
                raise self.lost
            if self._done:
                break
        done, self._done = tuple(self._done), []
        return Harvest(
            worker=self.name, incarnation=self.incarnation, groups=done, payload=object()
        )

    async def stop(self) -> None:
        self.stopped = True

    def finish(self, group: int, attempt: int = 0, failure: str | None = None) -> None:
        self._done.append(
            GroupMeta(
                group_id=group, attempt=attempt, samples=2, prompt_tokens=1, response_tokens=5,
                version_min=0, version_max=0, failure=failure, retryable=failure is not None,
            )
        )  # fmt: skip

    @property
    def groups(self) -> list[tuple[int, int]]:
        return [(given.group_id, given.attempt) for given in self.given]


class World:
    """A pool, the workers it made by (index, incarnation), and the events it wrote."""

    def __init__(self, loop: VirtualLoop, change: Callable[[Worker], None]) -> None:
        self.workers: dict[tuple[int, int], Worker] = {}
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._change = change
        limits = PoolSettings(
            start_timeout_s=100, stall_timeout_s=30, weights_timeout_s=20, max_restarts=2
        )
        self.pool = WorkerPool(self._make, limits, VirtualClock(loop), self._event)

    def _make(self, index: int, incarnation: int) -> Worker:
        made = self.workers[index, incarnation] = Worker(index, incarnation)
        self._change(made)
        return made

    def _event(self, kind: str, **detail: Any) -> None:
        self.events.append((kind, detail))

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]

    async def start(self, count: int) -> None:
        await self.pool.start(count, published(0))

    def submit(self, *groups: int, samples: int = 2) -> None:
        prompt = Prompt(id="p", messages=(), token_ids=(1,))
        self.pool.submit(
            [Assignment(group_id=group, prompt=prompt, samples=samples) for group in groups]
        )

    def finished(self) -> list[int]:
        taken = self.pool.take_finished()
        return [meta.group_id for _, metas in taken for meta in metas]


async def published(version: int, after_s: float = 0.0) -> WeightManifest:
    await asyncio.sleep(after_s)
    return manifest(version)


def play(
    scene: Callable[[World], Awaitable[T]], change: Callable[[Worker], None] = lambda _: None
) -> T:
    """Run a scene in virtual time; the pool is stopped at its end."""
    loop = VirtualLoop()

    async def whole() -> T:
        world = World(loop, change)
        try:
            return await scene(world)
        finally:
            await world.pool.stop()
            assert all(worker.stopped for worker in world.workers.values())

    return loop.run(whole())


# -- giving out groups -----------------------------------------------------------------------------


def test_a_group_goes_to_the_worker_with_the_fewest_samples_in_hand() -> None:
    async def scene(world: World) -> None:
        await world.start(2)
        world.submit(0, samples=8)
        world.submit(1, 2, 3, samples=2)
        await asyncio.sleep(0.5)
        assert world.workers[0, 0].groups == [(0, 0)]
        assert world.workers[1, 0].groups == [(1, 0), (2, 0), (3, 0)]
        assert world.pool.in_flight == 4
        world.workers[1, 0].finish(1)
        await asyncio.sleep(2)
        assert world.finished() == [1]
        assert world.pool.in_flight == 3

    play(scene)


def test_a_worker_that_is_slow_to_take_its_share_holds_up_nobody() -> None:
    def change(worker: Worker) -> None:
        worker.submit_s = FOREVER_S if worker.name == "w0" else 0.0

    async def scene(world: World) -> None:
        await world.start(2)
        world.submit(0, 1)
        await asyncio.sleep(0.5)
        assert world.workers[1, 0].groups == [(1, 0)]

    play(scene, change)


def test_a_group_whose_scoring_fails_is_generated_again_and_at_last_ends_the_run() -> None:
    async def scene(world: World) -> None:
        await world.start(1)
        worker = world.workers[0, 0]
        world.submit(7)
        for attempt in range(3):
            await asyncio.sleep(2)
            assert worker.groups[-1] == (7, attempt)
            worker.finish(7, attempt, failure="the reward service is away")
        await asyncio.sleep(2)
        with pytest.raises(Fatal, match="group 7 failed 3 times: the reward service is away"):
            world.pool.take_finished()

    play(scene)


# -- weights ---------------------------------------------------------------------------------------


def test_engines_are_built_before_the_first_weights_are_there_and_serve_after() -> None:
    def change(worker: Worker) -> None:
        worker.start_s = 10.0

    async def scene(world: World) -> float:
        await world.pool.start(2, published(0, after_s=12.0))
        assert [worker.loaded for worker in world.workers.values()] == [[0], [0]]
        assert world.pool.count("serving") == 2
        return asyncio.get_running_loop().time()

    assert play(scene, change) == pytest.approx(12.0)


def test_a_worker_that_joins_while_weights_move_on_serves_with_the_newest() -> None:
    def change(worker: Worker) -> None:
        worker.load_s = 5.0 if worker.name == "w1" else 0.0

    async def scene(world: World) -> None:
        await world.start(1)
        joining = asyncio.create_task(world.pool.resize(2))
        await asyncio.sleep(1)  # it is loading version 0
        assert await world.pool.broadcast(manifest(1))
        await joining
        await asyncio.sleep(10)
        assert world.workers[1, 0].loaded == [0, 1]
        serving = [detail for kind, detail in world.events if kind == "worker_serving"]
        assert [detail["version"] for detail in serving] == [0, 1]

    play(scene, change)


def test_a_worker_that_does_not_take_an_update_in_time_is_replaced_and_the_others_go_on() -> None:
    async def scene(world: World) -> None:
        await world.start(2)
        world.workers[0, 0].load_s = FOREVER_S
        reports = await world.pool.broadcast(manifest(1))
        assert len(reports) == 1
        await asyncio.sleep(1)
        assert world.workers[0, 0].stopped
        assert world.workers[0, 1].loaded == [1]
        assert world.pool.failed_swaps == 1

    play(scene)


# -- losses ----------------------------------------------------------------------------------------


def test_the_groups_of_a_lost_worker_go_to_another_and_its_late_answers_are_refused() -> None:
    async def scene(world: World) -> None:
        await world.start(2)
        world.submit(0, 1)
        await asyncio.sleep(0.5)
        first, other = world.workers[0, 0], world.workers[1, 0]
        first.lost = Retryable("killed")
        await asyncio.sleep(2)
        assert other.groups == [(1, 0), (0, 1)]
        loss = {"worker": "w0", "cause": "killed", "fault": "worker", "requeued": 1}
        assert ("worker_lost", loss) in world.events
        other.finish(0, attempt=0)  # as the lost one would have answered
        await asyncio.sleep(2)
        assert "stale_result_refused" in world.kinds()
        assert world.finished() == []
        other.finish(0, attempt=1)
        await asyncio.sleep(2)
        assert world.finished() == [0]

    play(scene)


@pytest.mark.parametrize("hangs", [True, False])
def test_a_worker_that_finishes_nothing_is_replaced(hangs: bool) -> None:
    """Whether its process does not answer at all, or answers and has nothing."""

    async def scene(world: World) -> None:
        await world.start(1)
        world.workers[0, 0].hangs = hangs
        world.submit(0)
        await asyncio.sleep(40)
        assert world.workers[0, 0].stopped
        assert world.workers[0, 1].groups == [(0, 1)]
        assert world.pool.restarts == 1

    play(scene)


def test_an_idle_worker_is_not_taken_for_a_hung_one() -> None:
    async def scene(world: World) -> None:
        await world.start(1)
        await asyncio.sleep(500)
        assert world.pool.restarts == 0

    play(scene)


def test_a_worker_that_is_lost_too_often_ends_the_run() -> None:
    async def scene(world: World) -> None:
        await world.start(1)
        for incarnation in range(3):
            world.workers[0, incarnation].lost = Retryable("killed")
            await asyncio.sleep(10)
        with pytest.raises(WorkersGone, match="w0: lost 3 times within 600 s; last cause: killed"):
            world.pool.take_finished()

    play(scene)


# -- resizing --------------------------------------------------------------------------------------


def test_a_drained_worker_finishes_what_it_holds_and_gets_nothing_more() -> None:
    async def scene(world: World) -> None:
        await world.start(2)
        world.submit(0, 1)
        await asyncio.sleep(0.5)
        await world.pool.resize(1)
        world.submit(2, 3)
        await asyncio.sleep(2)
        leaving = world.workers[1, 0]
        assert leaving.groups == [(1, 0)]
        assert world.workers[0, 0].groups == [(0, 0), (2, 0), (3, 0)]
        assert not leaving.stopped
        assert await world.pool.broadcast(manifest(1))
        assert leaving.loaded == [0, 1]  # what it still generates may be trained on, too
        leaving.finish(1)
        await asyncio.sleep(2)
        assert world.finished() == [1]
        assert leaving.stopped
        assert world.pool.count("serving") == 1

    play(scene)


def test_a_worker_that_was_added_and_cannot_start_leaves_the_others_at_work() -> None:
    def change(worker: Worker) -> None:
        worker.start_s = FOREVER_S if worker.name == "w1" else 0.0

    async def scene(world: World) -> None:
        await world.start(1)
        await world.pool.resize(2)
        await asyncio.sleep(150)
        assert world.pool.count("serving") == 1
        assert "worker_not_joined" in world.kinds()
        world.submit(0)
        await asyncio.sleep(0.5)
        assert world.workers[0, 0].groups == [(0, 0)]

    play(scene, change)
