"""Fault 6 on the real controller and pool, with a fake learner: its process dies while it trains or
while it waits, and another one takes over from what is on disk. No Ray."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.contracts.durable import FileDigest
from cluster.contracts.errors import LearnerLost, Resumable, RolledBack
from cluster.contracts.records import StepInput, StepResult, TensorEntry, WeightManifest
from tests.unit.cluster.loop.test_controller import (
    FakeLearner,
    World,
    build,
    drive,
    events,
    manifest,
)


def weights(version: int, history: tuple[int, ...]) -> WeightManifest:
    """What a learner publishes that has trained these groups."""
    entry = TensorEntry(
        name="w", shape=(1,), dtype="float32", nbytes=4, checksum=str(hash(history))
    )
    return replace(manifest(version), tensors=(entry,))


class MortalLearner(FakeLearner):
    """``on_disk``: how many of its newest steps a successor does not find on disk."""

    def __init__(self, *, not_on_disk: int = 0, forgets: bool = False) -> None:
        super().__init__(seconds=0.002)
        self.dies_in: dict[int, int] = {}  # step -> how often
        self.dies_after: set[int] = set()
        self.dies_saving: list[str] = []  # methods, each dies once
        self.not_on_disk, self.forgets = not_on_disk, forgets
        self.history: tuple[int, ...] = ()
        self.trained: dict[int, tuple[int, ...]] = {}
        self.starts = 0
        self.saves_last = 6
        self.died = asyncio.Event()

    async def start(self, step: int | None = None) -> WeightManifest:
        if step is not None:
            done = max(0, min(step, self.version) - self.not_on_disk)
            self.history = tuple(g for n in range(done) for g in self.trained[n])
            if self.forgets:
                self.history += (-1,)
            self.version = done
            self.died = asyncio.Event()
        self.starts += 1
        return weights(self.version, self.history)

    async def step(self, batch: StepInput) -> StepResult:
        if self.dies_in.get(batch.step, 0):
            self.dies_in[batch.step] -= 1
            await asyncio.sleep(0.002)
            raise LearnerLost("killed in a step")
        assert batch.step == self.version
        result = await super().step(batch)
        self.trained[batch.step] = batch.group_ids
        self.history += batch.group_ids
        if batch.step in self.dies_after:
            self.dies_after.remove(batch.step)
            self.died.set()
        return replace(result, manifest=weights(self.version, self.history))

    async def snapshot(self) -> int:
        self._die_in("snapshot")
        return await super().snapshot()

    async def store(self, directory: str) -> tuple[FileDigest, ...]:
        self._die_in("store")
        return await super().store(directory)

    def _die_in(self, method: str) -> None:
        if method in self.dies_saving and self.version == self.saves_last:
            self.dies_saving.remove(method)
            raise LearnerLost(f"killed in {method}")

    async def lost(self) -> None:
        await self.died.wait()
        raise LearnerLost("killed while it waited")


def of(kind: str, run: Any) -> list[dict[str, Any]]:
    return [event for event in events(run) if event["kind"] == kind]


@pytest.mark.parametrize("not_on_disk", [0, 1, 2])
@pytest.mark.parametrize("idle", [False, True], ids=["in a step", "idle"])
def test_06_a_killed_learner_is_replaced_and_each_prompt_is_trained_once(
    tmp_path: Path, idle: bool, not_on_disk: int
) -> None:
    async def scenario() -> None:
        learner = MortalLearner(not_on_disk=not_on_disk)
        if idle:
            learner.dies_after = {3}
        else:
            learner.dies_in = {3: 1}
        controller, pool, run, lines = build(tmp_path, World(), learner)
        state = await drive(controller, pool)
        assert state.step == 6
        assert learner.history == tuple(range(18))
        assert [step for step, _ in lines.rows] == [1, 2, 3, 4, 5, 6]  # none told twice
        assert len(of("learner_lost", run)) == len(of("learner_replaced", run)) == 1
        assert of("step_retried", run) == of("worker_lost", run) == []  # nothing sampled again

    asyncio.run(scenario())


@pytest.mark.parametrize("method", ["snapshot", "store"])
@pytest.mark.parametrize("not_on_disk", [0, 2])
def test_06_a_learner_that_dies_while_the_last_state_is_saved_is_replaced_too(
    tmp_path: Path, method: str, not_on_disk: int
) -> None:
    async def scenario() -> None:
        learner = MortalLearner(not_on_disk=not_on_disk)
        learner.dies_saving = [method]
        controller, pool, run, lines = build(tmp_path, World(), learner)
        await drive(controller, pool)
        assert run.checkpoints.newest_good().state.step == 6
        assert learner.history == tuple(range(18))
        assert [step for step, _ in lines.rows] == [1, 2, 3, 4, 5, 6]
        assert len(of("learner_replaced", run)) == 1

    asyncio.run(scenario())


def test_06_a_learner_that_dies_while_a_stopped_run_is_saved_leaves_it_resumable(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        learner = MortalLearner()
        controller, pool, run, lines = build(tmp_path, World(), learner, steps=100_000)
        learner.dies_saving, learner.saves_last = ["snapshot"], 5  # of the fourth, one is there
        lines.write = lambda step, numbers: controller.request_stop() if step == 5 else None  # type: ignore[method-assign]
        with pytest.raises(Resumable, match="state, of step 5, could not be saved: killed in sn"):
            await drive(controller, pool)
        assert run.checkpoints.newest_good().state.step == 4

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("learner", "words"),
    [
        ({"not_on_disk": 4}, "the rollouts of step 0 are not on disk"),
        ({"forgets": True}, "version 4, trained again, has other weights"),
    ],
)
def test_06_what_cannot_be_had_again_rolls_the_run_back(
    tmp_path: Path, learner: dict[str, Any], words: str
) -> None:
    async def scenario() -> None:
        mortal = MortalLearner(**learner)
        mortal.dies_after = {3}
        controller, pool, _, _ = build(tmp_path, World(), mortal)
        with pytest.raises(RolledBack, match=words):
            await drive(controller, pool)

    asyncio.run(scenario())


def test_06_a_learner_that_dies_again_and_again_ends_the_run(tmp_path: Path) -> None:
    async def scenario() -> None:
        learner = MortalLearner()
        learner.dies_in = {2: 100}
        controller, pool, run, _ = build(tmp_path, World(), learner)
        with pytest.raises(LearnerLost, match=r"lost 4 times within 600 s.*learner\.max_restarts"):
            await drive(controller, pool)
        assert len(of("learner_lost", run)) == 4

    asyncio.run(scenario())
