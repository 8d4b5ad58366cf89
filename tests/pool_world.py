"""A real pool with scripted workers, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from cluster.contracts.errors import EngineFailure, Retryable
from cluster.contracts.records import (
    AS_TRAINED,
    Assignment,
    Completion,
    Draw,
    GroupMeta,
    Harvest,
    Prompt,
    Rollout,
    SwapReport,
    VersionSpan,
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
        self.place_s = self.start_s = self.submit_s = self.load_s = 0.0
        self.start_problem: Exception | None = None
        self.load_problem: Exception | None = None
        self.poison: set[str] = set()  # ids of prompts that kill the engine
        self.sample_s, self.sample_times = 1.0, 1  # seconds; how often each completion is given
        self.sample_problem: Exception | None = None
        self.beside_groups = 0  # calls of ``sample`` while it held groups
        self.sampled: list[list[str]] = []  # ids of the prompts of each call of ``sample``
        self.stats: dict[str, float] = {}
        self.given: list[Assignment] = []
        self.loaded: list[int] = []
        self.lost: Exception | None = None
        self.hangs = False
        self.stopped = False
        self._done: list[GroupMeta] = []

    async def placed(self) -> None:
        await asyncio.sleep(self.place_s)

    async def start(self) -> Mapping[str, Any]:
        await asyncio.sleep(self.start_s)
        if self.start_problem is not None:
            raise self.start_problem
        return {"engine": "scripted", "node": f"node of {self.name}"}

    async def submit(self, assignments: Sequence[Assignment]) -> None:
        assert self.loaded, "given work before it had weights"
        await asyncio.sleep(self.submit_s)
        self.given += assignments

    async def load_weights(self, manifest: WeightManifest) -> SwapReport:
        await asyncio.sleep(self.load_s)
        if self.load_problem is not None:
            raise self.load_problem
        self.loaded.append(manifest.version)
        seconds = dict.fromkeys(("fetch_s", "verify_s", "stage_s", "pause_s", "prove_s"), 0.0)
        return SwapReport(version=manifest.version, canary_logp_diff=0.0, **seconds)

    async def sample(
        self, prompts: Sequence[Prompt], samples: int, timeout_s: float, draw: Draw = AS_TRAINED
    ) -> list[Rollout]:
        assert self.loaded, "asked before it had weights"
        first = self.loaded[-1]
        self.sampled.append([prompt.id for prompt in prompts])
        self.beside_groups += bool(self.given)
        try:
            await asyncio.wait_for(asyncio.sleep(self.sample_s), timeout_s)
        except TimeoutError:
            raise Retryable(f"{self.name} did not answer within {timeout_s:.0f} s") from None
        if self.sample_problem is not None:
            raise self.sample_problem
        if self.lost is not None:
            raise self.lost
        return [
            written(prompt, sample, first, self.loaded[-1])
            for prompt in prompts
            for sample in range(samples)
        ] * self.sample_times

    async def harvest(self, timeout_s: float) -> Harvest:
        if self.hangs:
            await asyncio.sleep(FOREVER_S)
        for _ in range(10):
            await asyncio.sleep(timeout_s / 10)
            if self.lost is not None:
                raise self.lost
            if any(given.prompt.id in self.poison for given in self.given):
                raise EngineFailure("an assertion of the engine failed")
            if self._done:
                break
        done, self._done = tuple(self._done), []
        return Harvest(
            worker=self.name,
            incarnation=self.incarnation,
            groups=done,
            payload=object(),
            stats=dict(self.stats),
        )

    async def stop(self) -> None:
        self.stopped = True

    def finish(
        self,
        group: int,
        attempt: int = 0,
        failure: str | None = None,
        late: bool = False,
        unrated: bool = False,
    ) -> None:
        self._done.append(
            GroupMeta(
                group_id=group, attempt=attempt, samples=2, prompt_tokens=1, response_tokens=5,
                version_min=0, version_max=0, failure=failure,
                retryable=failure is not None and not unrated, late=late, unrated=unrated,
            )
        )  # fmt: skip

    def finish_all(self) -> None:
        for given in self.given:
            self.finish(given.group_id, given.attempt)
        self.given = []

    @property
    def groups(self) -> list[tuple[int, int]]:
        return [(given.group_id, given.attempt) for given in self.given]


class World:
    """A pool, the workers it made by (index, incarnation), and the events it wrote."""

    def __init__(
        self, loop: VirtualLoop, change: Callable[[Worker], None], **settings: Any
    ) -> None:
        self.workers: dict[tuple[int, int], Worker] = {}
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._change = change
        usual = dict(start_timeout_s=100, stall_timeout_s=30, weights_timeout_s=20, max_restarts=2)
        limits = PoolSettings(**{**usual, **settings})
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
        self.pool.submit(
            [
                Assignment(group_id=group, prompt=prompt_of(group), samples=samples)
                for group in groups
            ]
        )

    def finished(self) -> list[int]:
        taken = self.pool.take_finished()
        return [meta.group_id for _, metas in taken for meta in metas]


def written(prompt: Prompt, sample: int, first: int, last: int | None = None) -> Rollout:
    """A completion of two tokens by the policy of version ``first``, the second by ``last``."""
    last = first if last is None else last
    completion = Completion(
        token_ids=(1, 2),
        logprobs=(-1.0, -1.0),
        versions=(
            VersionSpan(version=first, start=0, end=1),
            VersionSpan(version=last, start=1, end=2),
        ),
        finish_reason="stop",
    )
    return Rollout(prompt=prompt, completion=completion, sample_index=sample, text=prompt.id)


def prompt_of(group: int) -> Prompt:
    return Prompt(id=f"p{group}", messages=(), token_ids=(1,), where=f"prompts.jsonl:{group + 1}")


async def published(version: int, after_s: float = 0.0) -> WeightManifest:
    await asyncio.sleep(after_s)
    return manifest(version)


def play(
    scene: Callable[[World], Awaitable[T]],
    change: Callable[[Worker], None] = lambda _: None,
    **settings: Any,
) -> T:
    """Run a scene in virtual time; the pool is stopped at its end."""
    loop = VirtualLoop()

    async def whole() -> T:
        world = World(loop, change, **settings)
        try:
            return await scene(world)
        finally:
            await world.pool.stop()
            assert all(worker.stopped for worker in world.workers.values())

    return loop.run(whole())
