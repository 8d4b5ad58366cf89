"""Completions that workers write beside their groups, by workers that die, hang and answer twice;
in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from cluster.contracts.errors import Retryable, UserError, WorkerDied
from cluster.contracts.records import Draw, Prompt
from cluster.loop.beside import Sampled, Wanted
from tests.pool_world import FOREVER_S, Worker, World, play, prompt_of

PROMPTS = [prompt_of(at) for at in range(10)]


def wanted(prompts: list[Prompt] = PROMPTS, timeout_s: float = 90.0) -> Wanted:
    return Wanted(prompts, 2, Draw(seed=1), timeout_s)


def complete(sampled: Sampled) -> bool:
    """Every completion once, in order."""
    found = [(rollout.prompt.id, rollout.sample_index) for rollout in sampled.rollouts]
    return found == [(prompt.id, sample) for prompt in PROMPTS for sample in (0, 1)]


def test_each_worker_is_asked_for_its_part() -> None:
    async def scene(world: World) -> None:
        await world.start(3)
        sampled = await world.pool.sample(wanted())
        assert complete(sampled)
        assert sampled.repeated == 0
        assert sorted(len(w.sampled[0]) for w in world.workers.values()) == [2, 4, 4]
        assert world.pool.in_flight == 0  # no lease, no group

    play(scene)


def test_the_part_of_a_lost_worker_is_asked_of_another_one() -> None:
    def change(worker: Worker) -> None:
        worker.sample_s = 5.0

    async def scene(world: World) -> None:
        await world.start(2)
        asking = asyncio.create_task(world.pool.sample(wanted()))
        await asyncio.sleep(1.0)
        world.workers[0, 0].lost = WorkerDied("killed")
        sampled = await asking
        assert complete(sampled)
        assert sampled.repeated == 1

    play(scene, change)


def test_one_that_is_cut_off_is_given_up_as_soon_as_it_counts_as_lost() -> None:
    def change(worker: Worker) -> None:
        worker.sample_s = FOREVER_S if worker.name == "w1" and not worker.incarnation else 1.0

    async def scene(world: World) -> float:
        await world.start(2)
        asking = asyncio.create_task(world.pool.sample(wanted()))
        await asyncio.sleep(2.0)
        world.workers[1, 0].lost = WorkerDied("its host is away")
        assert complete(await asking)
        return asyncio.get_running_loop().time()

    assert play(scene, change) < 10.0


def test_a_worker_that_hangs_costs_its_own_deadline_only() -> None:
    def change(worker: Worker) -> None:
        worker.sample_s = FOREVER_S if worker.name == "w1" else 1.0

    async def scene(world: World) -> float:
        await world.start(2)
        began = asyncio.get_running_loop().time()
        assert complete(await world.pool.sample(wanted(timeout_s=90.0)))
        return asyncio.get_running_loop().time() - began

    assert play(scene, change) == pytest.approx(
        31.0, abs=1.0
    )  # a third of the whole, and once more


def test_a_worker_that_answers_twice_is_not_believed() -> None:
    def change(worker: Worker) -> None:
        worker.sample_times = 2 if worker.name == "w0" else 1

    async def scene(world: World) -> None:
        await world.start(2)
        sampled = await world.pool.sample(wanted())
        assert complete(sampled)
        assert sampled.repeated == 1

    play(scene, change)


def test_completions_that_cannot_be_had_are_given_up_with_the_cause() -> None:
    def change(worker: Worker) -> None:
        worker.sample_problem = Retryable("the engine is out of memory")

    async def scene(world: World) -> None:
        await world.start(2)
        with pytest.raises(Retryable, match="failed in turn; the last one: the engine is out of"):
            await world.pool.sample(wanted())

    play(scene, change)


def test_without_any_worker_the_deadline_counts() -> None:
    async def scene(world: World) -> None:
        await world.pool.resize(0)
        with pytest.raises(Retryable, match="10 of 10 prompts had no completions within 90 s"):
            await world.pool.sample(wanted())

    play(scene)


def test_a_prompt_that_no_engine_takes_is_told_at_once() -> None:
    def change(worker: Worker) -> None:
        worker.sample_problem = UserError("the prompt has 600 tokens")

    async def scene(world: World) -> None:
        await world.start(1)
        with pytest.raises(UserError, match="600 tokens"):
            await world.pool.sample(wanted())

    play(scene, change)
