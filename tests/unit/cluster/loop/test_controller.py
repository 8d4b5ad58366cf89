"""The real controller, pool and accounting, driven by fake workers and a fake learner. No Ray."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from cluster.contracts.config.monitors import MonitorsConfig
from cluster.contracts.durable import FileDigest
from cluster.contracts.errors import Fatal, Retryable, UserError, WeightMismatch, WorkersGone
from cluster.contracts.metrics import last
from cluster.contracts.records import (
    Assignment,
    Canary,
    GroupMeta,
    Harvest,
    Prompt,
    RunState,
    StepInput,
    StepResult,
    SwapReport,
    WeightManifest,
)
from cluster.contracts.step_parts import LEARNER_PARTS, unaccounted
from cluster.loop.controller import Controller
from cluster.loop.pool import WorkerPool
from cluster.loop.settings import LoopSettings, PoolSettings
from cluster.loop.timeline import Timeline
from cluster.measure.simulation.loop import VirtualLoop
from cluster.measure.simulation.roles import Trail
from cluster.runs.control import Wishes
from cluster.runs.monitor_actions import MonitorActions
from cluster.runs.run import Run
from tests.checkpoint_files import write_checkpoint


def manifest(version: int) -> WeightManifest:
    canary = Canary(token_ids=(1, 2), logprobs=(-1.0,), tolerance=1e-3)
    return WeightManifest(
        version=version, tensors=(), canary=canary, transport="fake", locator=None
    )


class RealClock:
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.01))


class Prompts:
    def __len__(self) -> int:
        return 1000

    def prompt(self, ordinal: int) -> Prompt:
        return Prompt(id=str(ordinal), messages=(), token_ids=(1,))


async def at_once() -> None:
    """Waits for nothing."""


class FakeLearner:
    def __init__(self, version: int = 0, seconds: float = 0.0) -> None:
        self.version, self.seconds = version, seconds
        self.batches: list[StepInput] = []
        # (steps done, payloads that it was told to fetch meanwhile)
        self.ahead: list[tuple[int, tuple[Any, ...]]] = []
        self.begun: list[StepInput] = []  # what it was told to work ahead on
        self.saved: list[str] = []
        self.lose: dict[int, int] = {}  # step -> how often its rollouts are lost on the way
        self.copied = -1
        self.store_s = 0.0
        self.store_problems: list[Exception] = []
        self.start_s = 0.0
        self.starting = at_once
        self.start_problem: Exception | None = None

    async def start(self, step: int | None = None) -> WeightManifest:
        await self.starting()
        await asyncio.sleep(self.start_s)
        if self.start_problem is not None:
            raise self.start_problem
        return manifest(self.version)

    def fetch_ahead(self, payloads: Sequence[Any]) -> None:
        self.ahead.append((len(self.batches), tuple(payloads)))

    async def work_ahead(self, batch: StepInput) -> None:
        self.begun.append(batch)

    async def step(self, batch: StepInput) -> StepResult:
        await asyncio.sleep(self.seconds)
        if self.lose.get(batch.step, 0):
            self.lose[batch.step] -= 1
            raise Retryable("rollouts are lost with the worker that held them")
        self.batches.append(batch)
        self.version = batch.step + 1
        return StepResult(
            step=batch.step,
            version=self.version,
            metrics=(last("objective/kl", 0.5),),
            manifest=manifest(self.version),
            trained_tokens=10,
        )

    async def snapshot(self) -> int:
        self.copied = self.version
        return 10

    async def lost(self) -> None:
        await asyncio.get_running_loop().create_future()

    async def store(self, directory: str) -> tuple[FileDigest, ...]:
        self.saved.append(directory)
        await asyncio.sleep(self.store_s)
        if self.store_problems:
            raise self.store_problems.pop(0)
        return write_checkpoint(Path(directory), str(self.copied))

    async def stop(self) -> None: ...


class FakeWorker:
    """Finishes one group a millisecond. ``script`` may act on a submission (raise, hang, fail)."""

    def __init__(self, index: int, incarnation: int, world: World) -> None:
        self.name, self.incarnation, self._world = f"w{index}", incarnation, world
        self.version = -1
        self._todo: list[tuple[Assignment, int]] = []

    async def placed(self) -> None: ...

    async def start(self) -> Mapping[str, Any]:
        await self._world.starting()
        await asyncio.sleep(self._world.start_s)
        if self._world.start_problem is not None:
            raise self._world.start_problem
        return {"engine": "fake"}

    async def submit(self, assignments: Sequence[Assignment]) -> None:
        assert self.version >= 0, "served before it had weights"
        self._todo += [(a, self.version) for a in assignments]

    async def harvest(self, timeout_s: float) -> Harvest:
        await asyncio.sleep(0.001)
        groups = []
        if self._todo:
            assignment, version = self._todo.pop(0)
            cause, retryable = self._world.act(self, assignment)
            groups.append(
                GroupMeta(
                    group_id=assignment.group_id,
                    attempt=assignment.attempt,
                    samples=assignment.samples,
                    prompt_tokens=1,
                    response_tokens=5,
                    version_min=version,
                    version_max=self.version,
                    failure=cause,
                    retryable=retryable,
                )
            )
        return Harvest(
            worker=self.name, incarnation=self.incarnation, groups=tuple(groups), payload=object()
        )

    async def load_weights(self, manifest: WeightManifest) -> SwapReport:
        await asyncio.sleep(0.002)
        if self._world.mismatch(self, manifest.version):
            raise WeightMismatch(f"version {manifest.version}: torn")
        self.version = manifest.version
        return SwapReport(
            version=manifest.version,
            fetch_s=0,
            verify_s=0,
            stage_s=0,
            pause_s=0.001,
            prove_s=0.0,
            canary_logp_diff=1e-6,
        )

    async def stop(self) -> None:
        self._world.stopped.append((self.name, self.incarnation))


class World:
    def __init__(self) -> None:
        self.stopped: list[tuple[str, int]] = []
        self.made: list[tuple[int, int]] = []
        self.kill: set[int] = set()  # group ids that kill their worker once
        self.fail: dict[int, tuple[str, bool]] = {}
        self.torn: dict[int, int] = {}  # version -> how many loads of it do not verify
        self.start_s = 0.0
        self.starting = at_once
        self.start_problem: Exception | None = None

    def make(self, index: int, incarnation: int) -> FakeWorker:
        self.made.append((index, incarnation))
        return FakeWorker(index, incarnation, self)

    def mismatch(self, worker: FakeWorker, version: int) -> bool:
        left = self.torn.get(version, 0)
        self.torn[version] = max(0, left - 1)
        return left > 0

    def act(self, worker: FakeWorker, assignment: Assignment) -> tuple[str | None, bool]:
        if assignment.group_id in self.kill:
            self.kill.remove(assignment.group_id)
            raise Retryable("killed")
        return self.fail.get(assignment.group_id, (None, False))


class NoConfig(BaseModel):
    pass


class Lines:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self.rows.append((step, dict(numbers)))

    def close(self) -> None: ...


def build(
    tmp_path: Path,
    world: World,
    learner: FakeLearner,
    *,
    steps: int = 6,
    bound: int = 2,
    workers: int = 2,
    state: RunState | None = None,
    saved: int | None = None,
    stall_timeout_s: float = 5,
    monitors: MonitorActions | None = None,
    again: Any = None,
    **settings: Any,
) -> tuple[Controller, WorkerPool, Run, Lines]:
    run = again or Run.create(str(tmp_path), "run", "train", NoConfig())
    clock, lines = RealClock(), Lines()
    pool = WorkerPool(
        world.make,
        PoolSettings(
            start_timeout_s=5,
            stall_timeout_s=stall_timeout_s,
            weights_timeout_s=5,
            max_restarts=2,
            harvest_s=0.1,
        ),
        clock,
        run.event,
    )
    usual = {"checkpoint_every": 4, "keep_checkpoints": 2, "stop_grace_s": 1.0}
    controller = Controller(
        LoopSettings(
            steps=steps,
            prompts_per_step=3,
            samples_per_prompt=2,
            staleness_bound=bound,
            workers=workers,
            **{**usual, **settings},
        ),
        Prompts(),
        learner,
        pool,
        run,
        [lines],
        clock,
        Timeline(),
        state=state,
        saved=saved,
        monitors=monitors,
    )
    return controller, pool, run, lines


def events(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]


def wish(controller: Controller, wishes: Callable[[], Wishes]) -> None:
    controller._steering._read = wishes


def looks_often(controller: Controller) -> None:
    """Every millisecond instead of every second."""

    async def look() -> None:
        while True:
            await asyncio.sleep(0.001)
            controller._look()

    controller._look_around = look  # type: ignore[method-assign]


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not reached():
            await asyncio.sleep(0.005)


async def drive(controller: Controller, pool: WorkerPool) -> Any:
    try:
        return await asyncio.wait_for(controller.run(), 20)
    finally:
        await pool.stop()


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_every_prompt_is_trained_once_in_order(tmp_path: Path, bound: int) -> None:
    learner = FakeLearner(seconds=0.003)
    controller, pool, run, lines = build(tmp_path, World(), learner, bound=bound)
    state = asyncio.run(drive(controller, pool))
    assert [g for b in learner.batches for g in b.group_ids] == list(range(18))
    assert (state.step, state.next_group) == (6, 18)
    assert [step for step, _ in lines.rows] == [1, 2, 3, 4, 5, 6]
    swaps = [row for _, row in lines.rows if "weight_sync/canary_logp_diff" in row]
    assert swaps[-1]["weight_sync/canary_logp_diff"] == pytest.approx(1e-6)
    found = run.checkpoints.newest_good()
    assert (found.path.name, found.state.step) == ("step-000006", 6)


def test_the_next_steps_rollouts_go_to_the_learner_while_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the trail's checkpoints are written beside it
    learner = FakeLearner(seconds=1.0)

    async def trained() -> None:
        controller, pool, _, _ = build(tmp_path, World(), learner, bound=1, again=Trail())
        await asyncio.wait_for(drive(controller, pool), 200)

    VirtualLoop().run(trained())
    # Told while one step goes on, each once: what the step after it trains on.
    assert len(learner.ahead) == len({done for done, _ in learner.ahead}) == 5
    for done, payloads in learner.ahead:
        assert payloads == learner.batches[done + 1].payloads


class Timed(FakeLearner):
    """Says where its time went, by the clock of the loop."""

    async def step(self, batch: StepInput) -> StepResult:
        now = asyncio.get_running_loop().time
        await asyncio.sleep(0.25)  # on the way to it
        began = now()
        result = await super().step(batch)
        spent = now() - began
        parts = {
            **dict.fromkeys(LEARNER_PARTS, 0.0),
            "forward": spent / 4,
            "backward": spent * 3 / 4,
        }
        times = [last(f"time/{part}", seconds) for part, seconds in parts.items()]
        return replace(result, metrics=(*times, last("time/step", spent)))

    async def snapshot(self) -> int:
        await asyncio.sleep(0.5)
        return await super().snapshot()


def test_the_parts_of_a_steps_time_add_up_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the trail's checkpoints are written beside it
    learner = Timed(seconds=1.0)
    learner.lose = {2: 1}

    async def trained() -> Lines:
        controller, pool, _, lines = build(tmp_path, World(), learner, bound=1, again=Trail())
        await asyncio.wait_for(drive(controller, pool), 200)
        return lines

    rows = [numbers for _, numbers in VirtualLoop().run(trained()).rows]
    assert len(rows) == 6
    assert [unaccounted(row) for row in rows] == pytest.approx([0.0] * 6, abs=1e-9)
    assert [row["time/hand_over"] for row in rows] == pytest.approx([0.25] * 6)
    # Step 3 is tried twice; the state is copied after step 4, and the last step waits for nothing.
    assert [row["time/redo"] for row in rows] == pytest.approx([0, 0, 1.25, 0, 0, 0])
    assert [row["time/checkpoint"] for row in rows] == pytest.approx([0, 0, 0, 0, 0.5, 0])
    assert [row["time/backward"] for row in rows] == pytest.approx([0.75] * 6)
    idle = [1.0 - 1.0 / row["time/step"] for row in rows]
    assert [row["perf/trainer_idle_frac"] for row in rows] == pytest.approx(idle)


class Streaming(Timed):
    """Computes a part of a step for 0.3 s, and nothing beside it."""

    def __init__(self) -> None:
        super().__init__(seconds=1.0)
        self.turns = asyncio.Lock()
        self.stepping = False

    async def work_ahead(self, batch: StepInput) -> None:
        assert not self.stepping
        async with self.turns:
            await super().work_ahead(batch)
            await asyncio.sleep(0.3)

    async def step(self, batch: StepInput) -> StepResult:
        self.stepping = True
        try:
            async with self.turns:
                return await super().step(batch)
        finally:
            self.stepping = False


def test_an_idle_learner_begins_with_the_parts_of_a_step_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the trail's checkpoints are written beside it
    learner = Streaming()
    learner.lose = {2: 1}

    class Slow(FakeWorker):
        async def harvest(self, timeout_s: float) -> Harvest:
            await asyncio.sleep(0.25)
            return await super().harvest(timeout_s)

    world = World()
    world.make = lambda index, incarnation: Slow(index, incarnation, world)  # type: ignore[method-assign]

    async def trained() -> Lines:
        controller, pool, _, lines = build(
            tmp_path, world, learner, bound=0, workers=1, again=Trail(), stream_parts=2
        )
        await asyncio.wait_for(drive(controller, pool), 200)
        return lines

    rows = [numbers for _, numbers in VirtualLoop().run(trained()).rows]
    # Of three groups in two parts, the first part has two. Each was told once, but for step 2,
    # whose rollouts were lost.
    steps = [0, 1, 2, 2, 3, 4, 5]
    assert [batch.step for batch in learner.begun] == steps
    assert [batch.group_ids for batch in learner.begun] == [(3 * s, 3 * s + 1) for s in steps]
    assert [unaccounted(row) for row in rows] == pytest.approx([0.0] * 6, abs=1e-9)
    ahead = [0.3, 0.3, 0.6, 0.3, 0.3, 0.3]
    assert [row["time/ahead"] for row in rows] == pytest.approx(ahead)
    assert [row["time/hand_over"] for row in rows] == pytest.approx([0.25] * 6)
    idle = [1.0 - (1.0 + own) / row["time/step"] for own, row in zip(ahead, rows, strict=True)]
    assert [row["perf/trainer_idle_frac"] for row in rows] == pytest.approx(idle)


def test_a_step_that_did_not_fit_into_memory_is_told(tmp_path: Path) -> None:
    class Small(FakeLearner):
        async def step(self, batch: StepInput) -> StepResult:
            tokens = 512 if batch.step == 2 else None
            return replace(await super().step(batch), smaller_microbatches=tokens)

    controller, pool, run, _ = build(tmp_path, World(), Small())
    asyncio.run(drive(controller, pool))
    told = [event for event in events(run) if event["kind"] == "learner_out_of_memory"]
    assert [(event["step"], event["tokens_per_microbatch"]) for event in told] == [(3, 512)]


def test_weights_that_a_worker_asks_for_are_retained_and_few_others(tmp_path: Path) -> None:
    """Workers load more slowly than the learner steps. The learner lets go of all versions but
    those that `StepInput` names. No serving worker may find the one it was told to load gone. One
    that joins may, once a newer one is being sent, and goes on to that."""
    gone: list[tuple[str, bool]] = []  # (the worker's status, whether a newer version is sent)
    held: set[int] = {0}
    most = 0

    class Letting(FakeLearner):
        async def step(self, batch: StepInput) -> StepResult:
            nonlocal held, most
            result = await super().step(batch)
            held = {v for v in (batch.step, batch.sending) if v is not None} | {result.version}
            most = max(most, len(held))
            return result

    class Watching(World):
        def mismatch(self, worker: FakeWorker, version: int) -> bool:
            if version not in held:
                (status,) = [w.status for w in pool.facts().workers if w.name == worker.name]
                gone.append((status, (pool.sent_version or 0) > version))
                raise Retryable(f"weights of version {version} are gone")
            return False

    world = Watching()
    world.kill = {7, 20, 31}  # their successors join while versions move on
    controller, pool, run, _ = build(tmp_path, world, Letting(), steps=20, bound=8)
    asyncio.run(drive(controller, pool))
    assert set(gone) <= {("starting", True)}
    kinds = [event["kind"] for event in events(run)]
    assert kinds.count("worker_lost") == 3, "those that were killed, and no other"
    assert "worker_not_joined" not in kinds
    assert most == 3


def test_a_worker_that_joins_goes_on_to_newer_weights_when_older_ones_are_gone(
    tmp_path: Path,
) -> None:
    class Gone(World):
        def mismatch(self, worker: FakeWorker, version: int) -> bool:
            if (worker.name, version) == ("w1", 1):
                raise Retryable("weights of version 1 are gone")
            return False

    async def scenario() -> list[dict[str, Any]]:
        _, pool, run, _ = build(tmp_path, Gone(), FakeLearner())
        first = asyncio.get_running_loop().create_future()
        first.set_result(manifest(1))
        try:
            await pool.start(1, first)
            joining = asyncio.ensure_future(pool.resize(2))
            await asyncio.sleep(0.001)  # w1 is loading version 1
            await pool.broadcast(manifest(2))
            await asyncio.wait_for(joining, 5)
            await until(lambda: pool.count("serving") == 2)
        finally:
            await pool.stop()
        return events(run)

    assert not [e for e in asyncio.run(scenario()) if e["kind"] == "worker_not_joined"]


def test_a_mismatch_is_blamed_on_the_version_that_did_not_verify(tmp_path: Path) -> None:
    """w1 joins with version 1 while version 2 is sent, and its successor fails on 2 for once: no
    version has failed twice, so the run goes on."""

    class OnceEach(World):
        def mismatch(self, worker: FakeWorker, version: int) -> bool:
            return (worker.name, worker.incarnation, version) in {("w1", 0, 1), ("w1", 1, 2)}

    async def scenario() -> list[dict[str, Any]]:
        _, pool, run, _ = build(tmp_path, OnceEach(), FakeLearner())
        first = asyncio.get_running_loop().create_future()
        first.set_result(manifest(1))
        try:
            await pool.start(1, first)
            joining = asyncio.ensure_future(pool.resize(2))
            await asyncio.sleep(0.001)  # w1 is loading version 1
            await pool.broadcast(manifest(2))
            await asyncio.wait_for(joining, 5)
            await until(lambda: pool.count("serving") == 2)
            assert pool.take_finished() == []
        finally:
            await pool.stop()
        return events(run)

    lost = [event for event in asyncio.run(scenario()) if event["kind"] == "worker_not_joined"]
    assert [event["cause"] for event in lost] == ["version 1: torn", "version 2: torn"]


def test_a_killed_worker_loses_nothing_and_comes_back_with_current_weights(tmp_path: Path) -> None:
    world, learner = World(), FakeLearner()
    world.kill = {4, 11}
    controller, pool, run, _ = build(tmp_path, world, learner, workers=2)
    asyncio.run(drive(controller, pool))
    assert [g for b in learner.batches for g in b.group_ids] == list(range(18))
    assert pool.restarts == 2
    assert {e["kind"] for e in events(run)} >= {"worker_lost", "worker_serving"}


def test_a_worker_that_keeps_dying_ends_the_run_with_its_cause(tmp_path: Path) -> None:
    world = World()
    world.act = lambda worker, assignment: (_ for _ in ()).throw(Retryable("no memory"))  # type: ignore
    controller, pool, _, _ = build(tmp_path, world, FakeLearner(), workers=1)
    with pytest.raises(WorkersGone, match=r"w0: lost 3 times .* no memory"):
        asyncio.run(drive(controller, pool))


def test_a_data_failure_is_dropped_with_its_reason_and_a_retryable_one_is_tried_again(
    tmp_path: Path,
) -> None:
    world, learner = World(), FakeLearner()
    world.fail = {2: ("prompt is not text", False)}
    controller, pool, _, _ = build(tmp_path, world, learner)
    state = asyncio.run(drive(controller, pool))
    assert [g for b in learner.batches for g in b.group_ids] == [g for g in range(18) if g != 2]
    assert [row["cause"] for row in state.dropped] == ["prompt is not text"]
    world.fail = {5: ("reward service down", True)}
    controller, pool, _, _ = build(tmp_path / "again", world, FakeLearner())
    with pytest.raises(Fatal, match="group 5 failed 3 times: reward service down"):
        asyncio.run(drive(controller, pool))


def test_stop_keeps_what_was_done(tmp_path: Path) -> None:
    learner = FakeLearner(seconds=0.02)
    controller, pool, run, _ = build(tmp_path, World(), learner, steps=1000)

    async def scenario() -> Any:
        asyncio.get_running_loop().call_later(0.3, controller.request_stop)
        return await drive(controller, pool)

    state = asyncio.run(scenario())
    restored = run.checkpoints.newest_good().state
    assert 0 < restored.step == state.step == len(learner.batches) < 1000


def test_resume_continues_with_the_next_prompt(tmp_path: Path) -> None:
    controller, pool, run, _ = build(tmp_path, World(), FakeLearner(), steps=4)
    state = asyncio.run(drive(controller, pool))
    learner = FakeLearner(version=4)
    again, pool, _, _ = build(tmp_path / "b", World(), learner, steps=6)
    again.__init__(  # type: ignore[misc]
        again._settings, Prompts(), learner, pool, run, [], RealClock(), Timeline(), state=state
    )
    asyncio.run(drive(again, pool))
    assert [g for b in learner.batches for g in b.group_ids] == list(range(12, 18))


def test_workers_are_added_and_drained_while_the_run_goes_on(tmp_path: Path) -> None:
    learner = FakeLearner(seconds=0.01)
    controller, pool, _, _ = build(tmp_path, World(), learner, steps=60, workers=1)
    wanted = iter([3] * 40 + [1] * 10_000)
    wish(controller, lambda: Wishes(workers=next(wanted)))
    asyncio.run(drive(controller, pool))
    assert [g for b in learner.batches for g in b.group_ids] == list(range(180))
    assert (pool.joined, pool.left) == (3, 2)


def test_a_run_goes_down_to_no_worker_and_up_again_without_a_lost_group(tmp_path: Path) -> None:
    learner = FakeLearner(seconds=0.002)
    controller, pool, run, _ = build(tmp_path, World(), learner, steps=60, workers=1)
    at_zero: list[int] = []

    def wishes() -> Wishes:
        wanted = 3 if controller.step < 10 else 0
        if wanted == 0 and pool.count("serving", "draining", "starting") == 0:
            at_zero.append(len(learner.batches))
        return Wishes(workers=2 if len(at_zero) > 20 else wanted)

    wish(controller, wishes)
    looks_often(controller)
    asyncio.run(drive(controller, pool))
    assert [g for b in learner.batches for g in b.group_ids] == list(range(180))
    assert at_zero[0] < 60
    assert not [e for e in events(run) if e["kind"] == "worker_lost"]


def test_workers_that_still_start_are_given_up_when_fewer_are_wanted(tmp_path: Path) -> None:
    world, learner = World(), FakeLearner(seconds=0.002)
    controller, pool, run, _ = build(tmp_path, world, learner, steps=200, workers=1)

    def wishes() -> Wishes:
        if controller.step == 5:
            world.start_s = 0.2  # those that are asked for now take long
        return Wishes(workers=3 if 5 <= controller.step < 10 else 1)

    wish(controller, wishes)
    looks_often(controller)
    asyncio.run(drive(controller, pool))
    assert len(learner.batches) == 200
    assert [e["wanted"] for e in events(run) if e["kind"] == "resize"] == [3, 1]
    assert pool.count("serving") == 0  # all are stopped at the end
    assert {name for name, _ in world.stopped} == {"w0", "w1", "w2"}


def test_a_paused_run_finishes_what_is_under_way_and_goes_on_later(tmp_path: Path) -> None:
    learner = FakeLearner(seconds=0.002)
    controller, pool, run, _ = build(tmp_path, World(), learner, steps=30)
    seen: list[int] = []

    def wishes() -> Wishes:
        paused = controller.step >= 10 and len(seen) < 50
        if paused and any(e["kind"] == "paused" for e in events(run)):
            seen.append(len(learner.batches))
        return Wishes(paused=paused)

    wish(controller, wishes)
    looks_often(controller)
    asyncio.run(drive(controller, pool))
    assert len(set(seen)) == 1  # nothing moved while it was paused
    assert [g for b in learner.batches for g in b.group_ids] == list(range(90))
    kinds = [e["kind"] for e in events(run) if e["kind"] in ("paused", "unpaused")]
    assert kinds == ["paused", "unpaused"]


def test_a_run_without_workers_rests_though_groups_wait_for_one(tmp_path: Path) -> None:
    learner = FakeLearner(seconds=0.002)
    controller, pool, run, _ = build(tmp_path, World(), learner, steps=30)
    rested: list[int] = []

    def wishes() -> Wishes:
        if controller.step < 10:
            return Wishes(workers=2)
        if any(e["kind"] == "paused" for e in events(run)):
            rested.append(pool.in_flight)
        return Wishes(workers=2) if rested else Wishes(workers=0, paused=controller.step >= 10)

    wish(controller, wishes)
    looks_often(controller)
    asyncio.run(drive(controller, pool))
    assert [g for b in learner.batches for g in b.group_ids] == list(range(90))
    assert rested


def test_a_stop_that_was_asked_for_waits_for_the_step_and_leaves_a_checkpoint(
    tmp_path: Path,
) -> None:
    learner = FakeLearner(seconds=0.5)
    controller, pool, run, _ = build(tmp_path, World(), learner, steps=30, stop_grace_s=0.01)
    asked: list[bool] = []

    def wishes() -> Wishes:
        if controller.step == 1 and "step" in controller.facts().under_way:
            asked.append(True)  # in the middle of the second step
        return Wishes(stop=bool(asked))

    wish(controller, wishes)
    looks_often(controller)
    state = asyncio.run(drive(controller, pool))
    assert controller.stopped_as_asked
    assert (state.step, len(learner.batches)) == (2, 2)
    assert run.newest_checkpoint() == 2


def test_each_request_is_acknowledged_once(tmp_path: Path) -> None:
    controller, pool, run, _ = build(tmp_path, World(), FakeLearner(seconds=0.002), steps=30)
    wish(controller, lambda: Wishes(request="a" if controller.step < 15 else "b", workers=2))
    looks_often(controller)
    asyncio.run(drive(controller, pool))
    assert [e["request"] for e in events(run) if e["kind"] == "control"] == ["a", "b"]


@pytest.mark.parametrize("version", [0, 2])
def test_a_worker_whose_weights_do_not_verify_is_replaced_once(
    tmp_path: Path, version: int
) -> None:
    world, learner = World(), FakeLearner()
    world.torn = {version: 1}
    controller, pool, run, _ = build(tmp_path, world, learner, bound=0)  # each is sent
    asyncio.run(drive(controller, pool))
    assert [g for b in learner.batches for g in b.group_ids] == list(range(18))
    assert pool.restarts == 1
    kind = "worker_lost" if version else "worker_not_joined"
    assert [e["cause"] for e in events(run) if e["kind"] == kind] == [f"version {version}: torn"]


@pytest.mark.parametrize("version", [0, 2])
def test_weights_that_do_not_verify_twice_end_the_run(tmp_path: Path, version: int) -> None:
    world = World()
    world.torn = {version: 2}
    controller, pool, _, _ = build(tmp_path, world, FakeLearner(), workers=1, bound=0)
    with pytest.raises(
        WorkersGone, match=f"w0: replaced, still does not verify; .*version {version}"
    ):
        asyncio.run(drive(controller, pool))
    assert pool.restarts == 1


def test_a_step_whose_rollouts_were_lost_is_generated_again(tmp_path: Path) -> None:
    world, learner = World(), FakeLearner()
    world.fail = {4: ("prompt is not text", False)}
    learner.lose = {1: 2, 5: 1}
    submitted: list[Assignment] = []
    controller, pool, run, _ = build(tmp_path, world, learner)
    world.act = lambda worker, a: submitted.append(a) or world.fail.get(a.group_id, (None, False))  # type: ignore
    state = asyncio.run(drive(controller, pool))
    assert [g for b in learner.batches for g in b.group_ids] == [g for g in range(18) if g != 4]
    assert sorted(a.attempt for a in submitted if a.group_id == 3) == [0, 1, 2]
    assert [a.attempt for a in submitted if a.group_id == 4] == [0]  # it was not lost: it failed
    assert [row["group"] for row in state.dropped] == [4]
    assert [e["step"] for e in events(run) if e["kind"] == "step_retried"] == [1, 1, 5]


def test_a_step_whose_rollouts_are_always_lost_ends_the_run(tmp_path: Path) -> None:
    learner = FakeLearner()
    learner.lose = {1: 99}
    controller, pool, _, _ = build(tmp_path, World(), learner)
    with pytest.raises(Fatal, match="step 1 was tried 3 times: rollouts are lost"):
        asyncio.run(drive(controller, pool))


async def both(begun: dict[str, asyncio.Event], role: str) -> None:
    begun[role].set()
    async with asyncio.timeout(20):
        await asyncio.gather(*(event.wait() for event in begun.values()))


def test_learner_and_workers_start_side_by_side(tmp_path: Path) -> None:
    """Each of them waits until the other has begun: one after the other they would never."""
    world, learner = World(), FakeLearner()
    begun = {"learner": asyncio.Event(), "worker": asyncio.Event()}
    world.starting = lambda: both(begun, "worker")
    learner.starting = lambda: both(begun, "learner")
    controller, pool, run, _ = build(tmp_path, world, learner, steps=1)
    asyncio.run(drive(controller, pool))
    kinds = [row["kind"] for row in events(run)]
    assert kinds.index("learner_ready") < kinds.index("worker_serving")


@pytest.mark.parametrize("role", ["learner", "worker"])
def test_the_first_role_that_cannot_start_ends_the_start_of_the_others(
    tmp_path: Path, role: str
) -> None:
    world, learner = World(), FakeLearner()
    broken, slow = (learner, world) if role == "learner" else (world, learner)
    broken.start_problem, slow.start_s = UserError("no such model", where="m"), 30.0
    controller, pool, _, _ = build(tmp_path, world, learner)
    began = time.monotonic()
    with pytest.raises(UserError, match="no such model"):
        asyncio.run(drive(controller, pool))
    assert time.monotonic() - began < 5.0
    assert set(world.stopped) == {(f"w{index}", 0) for index in range(2)}


def test_a_stop_while_workers_start_does_not_wait_for_them(tmp_path: Path) -> None:
    world = World()
    world.start_s = 4.0
    controller, pool, run, _ = build(tmp_path, world, FakeLearner())

    async def scenario() -> tuple[int, float]:
        loop = asyncio.get_running_loop()
        loop.call_later(0.05, controller.request_stop)
        began = loop.time()
        state = await drive(controller, pool)
        return state.step, loop.time() - began

    step, seconds = asyncio.run(scenario())
    assert step == 0
    assert seconds < 1.0
    assert not (run.path / "checkpoints").exists()


def test_a_worker_that_cannot_join_leaves_the_run_going(tmp_path: Path) -> None:
    world, learner = World(), FakeLearner(seconds=0.005)
    controller, pool, run, _ = build(tmp_path, world, learner, steps=40, workers=1)

    def make(index: int, incarnation: int) -> FakeWorker:
        worker = FakeWorker(index, incarnation, world)
        if index > 0:

            async def start() -> Mapping[str, Any]:
                raise Fatal("no CPU is free")

            worker.start = start  # type: ignore[method-assign]
        return worker

    pool._recruiter._factory = make
    wish(controller, lambda: Wishes(workers=2))
    asyncio.run(drive(controller, pool))
    assert len(learner.batches) == 40
    failed = [e for e in events(run) if e["kind"] == "worker_not_joined"]
    assert {e["cause"] for e in failed} == {"no CPU is free"}


def test_a_wanted_kl_coefficient_goes_with_the_next_step_once(tmp_path: Path) -> None:
    """Also when that step's rollouts are lost on the way and it is asked for again."""

    class Raises(Lines):
        def write(self, step: int, numbers: Mapping[str, float]) -> None:
            super().write(step, numbers)
            if step == 2:
                monitors.kl_coef = 0.2

    monitors = MonitorActions(MonitorsConfig(), tmp_path)
    learner = FakeLearner()
    learner.lose[2] = 1
    controller, pool, _, _ = build(tmp_path, World(), learner, monitors=monitors)
    controller._books._sinks._sinks.append(Raises())  # type: ignore[attr-defined]
    asyncio.run(drive(controller, pool))
    assert [batch.kl_coef for batch in learner.batches] == [None, None, 0.2, None, None, None]
