"""Faults of rollout workers, by the numbers of the table in docs/fault-model.md: real controller
and pool, scripted workers, virtual time. ``train`` audits every run at its end."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from cluster.contracts.errors import (
    EngineFailure,
    MachineLost,
    Retryable,
    WeightMismatch,
    WorkerDied,
)
from cluster.contracts.records import SwapReport, WeightManifest
from cluster.runs.control import Wishes
from tests.run_world import Sampler, Training, train


async def nothing(training: Training) -> None:
    await training.running


def test_01_workers_are_killed_serving_and_idle() -> None:
    async def scene(training: Training) -> None:
        for number in range(12):
            await asyncio.sleep(4)
            serving = training.serving()
            serving[number % len(serving)].lost = WorkerDied("killed")

    training, audit = train(scene, steps=60, max_restarts=100)
    assert training.pool.faults["worker"] == 12
    assert audit.dropped.total() == 0  # no prompt is blamed for it


def test_02_an_engine_dies_and_its_successor_serves_only_with_current_weights() -> None:
    async def scene(training: Training) -> None:
        await asyncio.sleep(4)
        training.workers[0, 0].lost = EngineFailure("EngineDeadError")
        await asyncio.sleep(4)
        assert training.workers[0, 1].loaded[0] > 0

    training, _ = train(scene)
    assert training.pool.faults["engine"] == 1


def test_03_a_hung_worker_is_replaced_and_what_it_answers_later_is_refused() -> None:
    async def scene(training: Training) -> None:
        await asyncio.sleep(3)
        zombie = training.workers[1, 0]
        zombie.pace_s = None  # it answers, but samples nothing any more
        await asyncio.sleep(45)
        assert (1, 1) in training.workers
        # Its successor hands over what the zombie had: another attempt, so it counts for nothing.
        heir = training.workers[1, 1]
        heir.pace_s = None
        await asyncio.sleep(1)
        for given in zombie.given:
            heir._done.append(heir.meta(given, heir.loaded[-1], None))
        heir.pace_s = 0.5

    training, _ = train(scene, steps=60, bound=3)
    assert training.pool.restarts == 1


def test_10_a_node_is_drained_by_its_deadline_and_another_worker_takes_its_place() -> None:
    async def scene(training: Training) -> None:
        await asyncio.sleep(2)
        training.workers[2, 0].pace_s = None
        await asyncio.sleep(1)
        assert await training.pool.drain("node of w2", 8) == 1
        await asyncio.sleep(1)
        assert training.pool.count("serving") == 3
        assert training.workers[2, 0].stopped

    training, audit = train(scene, steps=30)
    assert training.pool.restarts == 0
    assert audit.dropped.total() == 0


def test_10_a_lost_node_takes_two_workers_at_once_and_is_not_charged() -> None:
    async def scene(training: Training) -> None:
        for _ in range(3):
            await asyncio.sleep(3)
            for worker in training.serving()[:2]:
                worker.lost = MachineLost("its node has died")

    _, audit = train(scene, steps=30, max_restarts=0)
    assert audit.dropped.total() == 0


def test_11_the_number_of_workers_changes_one_three_one_none_two() -> None:
    async def scene(training: Training) -> None:
        for wanted in (3, 1, 0, 2):
            training.wishes = Wishes(workers=wanted, request=str(wanted))
            await asyncio.sleep(5)
            assert training.pool.count("serving") == wanted

    training, audit = train(scene, steps=40, workers=1)
    assert audit.dropped.total() == 0
    assert training.pool.left >= 3


def test_15_a_weight_update_is_cut_in_every_worker_once() -> None:
    class Cut(Sampler):
        async def load_weights(self, manifest: WeightManifest) -> SwapReport:
            if self.incarnation == 0 and manifest.version == 3 + self.index:
                raise (WeightMismatch if self.index else Retryable)("torn")
            return await super().load_weights(manifest)

    class World(Training):
        def _make(self, index: int, incarnation: int) -> Sampler:
            made = self.workers[index, incarnation] = Cut(index, incarnation)
            made.index = index  # type: ignore[attr-defined]
            return made

    training, _ = train(nothing, steps=20, world=World)
    assert training.pool.failed_swaps == 3
    assert {incarnation for _, incarnation in training.workers} == {0, 1}


def test_16_a_straggler_slows_nobody_and_its_long_completions_are_trained() -> None:
    def slow(worker: Sampler) -> None:
        worker.pace_s = 10.0 if worker.name == "w3" else 0.5

    def even(worker: Sampler) -> None:
        worker.pace_s = 0.5

    fast, _ = train(nothing, even, steps=30, workers=4, bound=4)
    held_up, audit = train(nothing, slow, steps=30, workers=4, bound=4)
    assert audit.dropped.total() == 0
    assert held_up.pool.restarts == 0
    elapsed = [run.books.numbers["run/elapsed_s"] for run in (fast, held_up)]
    assert elapsed[1] < 12 * elapsed[0]  # it would be twenty times, were all as slow


def test_17_a_poisoned_prompt_is_set_aside_and_the_workers_go_on() -> None:
    def poisoned(worker: Sampler) -> None:
        worker.poison = {"p7"}
        worker.fail = {11: "holds a lone surrogate"}

    training, audit = train(nothing, poisoned)
    assert training.pool.restarts == 2
    assert sorted(reason.split(";")[0] for reason in audit.dropped) == [
        "holds a lone surrogate",
        "it killed two workers that had it in hand",
    ]
    assert [row["prompt"] for row in training.books.of("prompt_set_aside")] == ["p7"]
    assert training.pool.faults["prompt"] == 2


def test_18_results_that_come_twice_late_or_not_at_all_count_once() -> None:
    def twice(worker: Sampler) -> None:
        hand_over = worker.finish_begun

        def again(before: float, most: int = 10**6) -> None:
            hand_over(before, most)
            worker._done += [replace(meta) for meta in worker._done]

        worker.finish_begun = again  # type: ignore[method-assign]

    async def scene(training: Training) -> None:
        training.learner.lose = {2, 5, 7}
        await asyncio.sleep(3)
        training.workers[0, 0].lost = WorkerDied("killed")

    training, _ = train(scene, twice)
    assert len(training.books.of("stale_result_refused")) > 10
    assert len(training.books.of("step_retried")) == 3


@pytest.mark.parametrize("frozen_s", [5.0, 200.0])
def test_20_a_program_that_stood_still_takes_the_answers_that_came_meanwhile(
    frozen_s: float,
) -> None:
    """As after a suspended machine or a slow disk: deadlines are over, the answers are there."""

    async def scene(training: Training) -> None:
        await asyncio.sleep(4)
        loop = asyncio.get_running_loop()
        loop._now += frozen_s  # type: ignore[attr-defined]
        await asyncio.sleep(1)

    training, _ = train(scene, steps=20)
    assert training.pool.restarts == 0


def test_20_a_split_network_is_a_worker_that_does_not_answer() -> None:
    async def scene(training: Training) -> None:
        await asyncio.sleep(3)
        training.workers[0, 0].hangs = True
        await asyncio.sleep(60)
        assert (0, 1) in training.workers

    training, audit = train(scene, steps=80)
    assert training.pool.restarts == 1
    assert audit.dropped.total() == 0
