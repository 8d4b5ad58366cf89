"""What the pool does with groups, weights and workers that misbehave; in virtual time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.contracts.errors import (
    BadReward,
    EngineFailure,
    Fatal,
    LearnerLost,
    MachineLost,
    Retryable,
    RewardFailure,
    Unexpected,
    UserError,
    WeightsAway,
    WorkerDied,
    WorkersGone,
)
from cluster.measure.simulation.roles import manifest
from tests.pool_world import FOREVER_S, Worker, World, play, published

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


def test_groups_wait_for_room_and_the_oldest_goes_first_when_a_worker_is_lost() -> None:
    def change(worker: Worker) -> None:
        worker.place_s = FOREVER_S if worker.incarnation else 0.0

    async def scene(world: World) -> None:
        await world.start(2)
        world.submit(0, 1, 2, 3, 4, 5)  # room for six samples each: three groups of two
        world.submit(6, 7)
        await asyncio.sleep(0.5)
        first, other = world.workers[0, 0], world.workers[1, 0]
        assert other.groups == [(1, 0), (3, 0), (5, 0)]
        assert world.pool.in_flight == 8
        first.lost = Retryable("killed")
        await asyncio.sleep(2)
        assert other.groups == [(1, 0), (3, 0), (5, 0)]
        other.stats["sampled"] = 1.0  # one sample of an open group is done: room for a group
        await asyncio.sleep(2)
        # What the lost worker held is older than 6 and 7, which have waited longer.
        assert other.groups[3:] == [(0, 1)]

    play(scene, change, slots=4)


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


def test_groups_without_a_score_are_left_out_until_they_are_too_many() -> None:
    async def scene(world: World) -> None:
        await world.start(1)
        worker = world.workers[0, 0]
        world.submit(*range(300))
        for group in range(280):  # 5 %
            no = group % 20 == 19
            worker.finish(group, failure="no rating" if no else None, unrated=no)
        await asyncio.sleep(2)
        assert len(world.finished()) == 280, "their steps go on without them"
        worker.finish(280, failure="no rating", unrated=True)
        await asyncio.sleep(2)
        with pytest.raises(BadReward, match=r"15 of 281 groups got no score, .* 0.05. .*no rating"):
            world.finished()

    play(scene)


def test_a_few_groups_without_a_score_are_always_borne() -> None:
    async def scene(world: World) -> None:
        await world.start(1)
        world.submit(*range(9))
        for group in range(8):
            world.workers[0, 0].finish(group, failure="no rating", unrated=True)
        await asyncio.sleep(2)
        assert len(world.finished()) == 8
        world.workers[0, 0].finish(8, failure="no rating", unrated=True)
        await asyncio.sleep(2)
        with pytest.raises(BadReward, match="9 of 9 groups"):
            world.finished()

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


def test_a_joiner_that_loads_slower_than_weights_move_on_is_waited_for_and_serves() -> None:
    """Each step takes 1 s, its load 5 s: it would be behind for ever."""

    def change(worker: Worker) -> None:
        worker.load_s = 5.0 if worker.name == "w1" else 0.0

    async def scene(world: World) -> list[float]:
        await world.start(1)
        await world.pool.resize(2)
        took = []
        for version in range(1, 30):
            began = asyncio.get_running_loop().time()
            async with asyncio.timeout(60):
                assert await world.pool.broadcast(manifest(version))
            took.append(asyncio.get_running_loop().time() - began)
            if world.pool.count("serving") == 2:
                break
            await asyncio.sleep(1)
        assert world.workers[1, 0].loaded[-1] == version
        assert len(world.workers[1, 0].loaded) <= 4
        assert ("broadcast_awaits", {"worker": "w1", "missed": 2}) in world.events
        return took

    took = play(scene, change)
    assert took[:-1] == [0.0] * (len(took) - 1), "only the last broadcast waits"
    assert 0 < took[-1] <= 10


@pytest.mark.parametrize("what", ["hangs", "leaves", "the learner is gone"])
def test_a_broadcast_waits_no_longer_for_a_joiner_that_cannot_come(what: str) -> None:
    def change(worker: Worker) -> None:
        worker.load_s = 5.0 if worker.name == "w1" else 0.0

    async def gone() -> None:
        raise LearnerLost("killed")

    async def scene(world: World) -> None:
        await world.start(1)
        await world.pool.resize(2)
        version = 0
        while "broadcast_awaits" not in world.kinds():
            version += 1
            await world.pool.broadcast(manifest(version))
            await asyncio.sleep(1.3)
        joiner = world.workers[1, 0]
        assert len(joiner.loaded) == 2
        if what == "hangs":
            joiner.load_s = FOREVER_S
        elif what == "the learner is gone":
            joiner.load_problem = Retryable("lost with the learner")
            world.pool.weights_come_from(gone)
        broadcast = asyncio.create_task(world.pool.broadcast(manifest(version + 1)))
        await asyncio.sleep(1)
        assert not broadcast.done()
        if what == "leaves":
            await world.pool.resize(1)
        async with asyncio.timeout(60):
            await broadcast
        if what != "leaves":
            assert world.pool.count("starting") == 1

    play(scene, change)


def test_a_worker_that_misses_a_lost_learners_weights_goes_on_while_the_next_one_starts() -> None:
    """The next one's process already answers, but has not published them yet."""

    async def scene(world: World) -> None:
        await world.start(2)
        slow = world.workers[0, 0]
        slow.load_s, slow.load_problem = 2.0, Retryable("weights of version 1 are lost")
        broadcast = asyncio.create_task(world.pool.broadcast(manifest(1)))
        await asyncio.sleep(1)
        world.pool.weights_lost()
        with pytest.raises(WeightsAway):
            await broadcast
        assert "worker_lost" not in world.kinds()
        slow.load_problem = None
        await world.pool.broadcast(manifest(1))
        assert slow.loaded == [0, 1]

    play(scene)


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


# -- classes of failures ---------------------------------------------------------------------------

CUDA = "CUDA out of memory"


def engine_fails(worker: Worker) -> None:
    worker.start_problem = EngineFailure(CUDA)


def test_an_engine_that_fails_costs_a_restart_and_not_the_run() -> None:
    async def scene(world: World) -> None:
        await world.start(3)
        world.submit(0, 1, 2)
        await asyncio.sleep(0.5)
        world.workers[1, 0].lost = EngineFailure(CUDA)
        await asyncio.sleep(5)
        assert world.finished() == []  # raises what ended the pool
        assert world.pool.count("serving") == 3
        assert (world.pool.faults["engine"], world.pool.faults["worker"]) == (1, 0)

    play(scene)


def test_a_lost_machine_is_not_charged() -> None:
    async def scene(world: World) -> None:
        await world.start(1)
        for incarnation in range(8):
            world.workers[0, incarnation].lost = MachineLost("taken back")
            await asyncio.sleep(40)
        assert world.finished() == []
        assert world.pool.count("serving") == 1

    play(scene, max_restarts=0)


def test_what_nobody_foresaw_is_borne_three_times() -> None:
    async def scene(world: World) -> None:
        await world.start(4)
        for index in range(3):
            world.workers[index, 0].lost = Unexpected("KeyError: 'surprise'")
        await asyncio.sleep(10)
        assert world.finished() == []
        world.workers[3, 0].lost = Unexpected("KeyError: 'surprise'")
        await asyncio.sleep(10)
        with pytest.raises(Fatal, match=r"4 times within 600 s .* nobody foresaw.*surprise"):
            world.pool.take_finished()

    play(scene)


def test_an_engine_that_no_worker_can_build_ends_the_start_at_once() -> None:
    async def scene(world: World) -> float:
        with pytest.raises(EngineFailure, match=CUDA):
            await world.start(3)
        return asyncio.get_running_loop().time()

    assert play(scene, engine_fails) < 5.0


def test_one_worker_that_cannot_build_its_engine_at_the_start_does_not_end_it() -> None:
    def change(worker: Worker) -> None:
        if (worker.name, worker.incarnation) in {("w1", 0), ("w1", 1)}:
            engine_fails(worker)

    async def scene(world: World) -> None:
        await world.start(2)
        await asyncio.sleep(5)
        assert world.pool.count("serving") == 2

    play(scene, change)


# -- replacements that cannot start ----------------------------------------------------------------


@pytest.mark.parametrize(
    "problem",
    [EngineFailure(CUDA), UserError("vLLM cannot run this model"), RewardFailure("service away")],
)
def test_a_replacement_that_cannot_start_is_tried_until_it_can(problem: Exception) -> None:
    """However long that takes: the GPU's memory is freed, or the service comes back, in the end."""

    def change(worker: Worker) -> None:
        if worker.name == "w0" and 0 < worker.incarnation < 12:
            worker.start_problem = problem

    async def scene(world: World) -> None:
        await world.start(2)
        world.workers[0, 0].lost = WorkerDied("killed")
        await asyncio.sleep(80)
        assert world.finished() == []
        assert world.pool.count("serving") == 1
        await asyncio.sleep(300)
        assert world.pool.count("serving") == 2
        tries = [detail for kind, detail in world.events if kind == "worker_not_joined"]
        assert len(tries) == 11
        assert max(detail["again_in_s"] for detail in tries) <= 30.0
        assert sum(detail["again_in_s"] for detail in tries) > 80.0  # it does not thrash

    play(scene, change)


def test_a_worker_waits_for_room_as_long_as_it_takes_and_is_asked_for_once() -> None:
    def change(worker: Worker) -> None:
        worker.place_s = 5000.0 if worker.name == "w0" and worker.incarnation == 1 else 0.0

    async def scene(world: World) -> None:
        await world.start(1)
        world.workers[0, 0].lost = MachineLost("its node has died")
        await asyncio.sleep(5)
        world.submit(0)
        await asyncio.sleep(3995)
        assert world.finished() == []
        assert set(world.workers) == {(0, 0), (0, 1)}
        words = [detail for kind, detail in world.events if kind == "workers_missing"]
        assert words[0]["cause"] == "w0 waits for room on the cluster"
        assert 60 < len(words) < 70  # one a minute
        await asyncio.sleep(2000)
        assert world.workers[0, 1].groups == [(0, 0)]

    play(scene, change)


def test_with_too_few_workers_nothing_is_given_out() -> None:
    def change(worker: Worker) -> None:
        worker.place_s = 100.0 if worker.incarnation else 0.0

    async def scene(world: World) -> None:
        await world.start(2)
        world.workers[1, 0].lost = WorkerDied("killed")
        await asyncio.sleep(2)
        world.submit(0)
        await asyncio.sleep(50)
        assert world.workers[0, 0].groups == []
        await asyncio.sleep(60)
        assert world.workers[0, 0].groups == [(0, 0)]

    play(scene, change, min_workers=2)


def test_too_few_workers_for_too_long_end_the_run() -> None:
    def change(worker: Worker) -> None:
        worker.place_s = FOREVER_S if worker.incarnation else 0.0

    async def scene(world: World) -> None:
        await world.start(2)
        for index in range(2):
            world.workers[index, 0].lost = MachineLost("its node has died")
        await asyncio.sleep(590)
        assert world.finished() == []
        await asyncio.sleep(20)
        with pytest.raises(WorkersGone, match=r"0 workers serve, 1 must, for 600 s .*w1 waits"):
            world.pool.take_finished()

    play(scene, change, workers_timeout_s=600)


def test_a_worker_that_fails_by_itself_is_given_up_and_the_others_go_on() -> None:
    async def scene(world: World) -> None:
        await world.start(2)
        for incarnation in range(3):
            world.workers[0, incarnation].lost = WorkerDied("segmentation fault")
            await asyncio.sleep(10)
        assert world.finished() == []
        assert world.pool.count("serving") == world.pool.count("broken") == 1
        world.submit(0)
        await asyncio.sleep(2)
        assert world.workers[1, 0].groups == [(0, 0)]
        await asyncio.sleep(600)
        assert world.pool.count("serving") == 2  # forgiven

    play(scene)


# -- progress --------------------------------------------------------------------------------------


def test_a_long_completion_is_no_stall() -> None:
    async def scene(world: World) -> None:
        await world.start(1)
        worker = world.workers[0, 0]
        world.submit(0)
        for tokens in range(600):  # 32k tokens at 50 a second
            worker.stats = {"generated_tokens": 0.0, "unfinished_tokens": tokens, "unfinished": 2}
            await asyncio.sleep(1)
        assert world.pool.restarts == 0
        await asyncio.sleep(40)  # now it samples nothing any more
        assert world.pool.restarts == 1
        assert world.pool.faults["engine"] == 1

    play(scene)


def test_waiting_for_scores_is_no_stall() -> None:
    async def scene(world: World) -> None:
        await world.start(1)
        world.submit(0)
        world.workers[0, 0].stats = {"generated_tokens": 90.0, "unfinished": 0, "scoring": 1}
        await asyncio.sleep(300)
        assert world.pool.restarts == 0

    play(scene)


# -- draining --------------------------------------------------------------------------------------


def test_a_node_is_drained_and_what_is_not_done_by_the_deadline_goes_to_others() -> None:
    async def scene(world: World) -> None:
        await world.start(2)
        world.submit(0, 1, 2, 3)
        await asyncio.sleep(0.5)
        draining = asyncio.create_task(world.pool.drain("node of w1", 20))
        await asyncio.sleep(1)
        assert world.pool.count("serving") == 2  # another one has taken its place
        world.workers[1, 0].finish(1)
        await asyncio.sleep(2)
        assert world.finished() == [1]
        assert await draining == 1
        await asyncio.sleep(1)
        assert world.workers[1, 0].stopped
        assert (3, 1) in [*world.workers[0, 0].groups, *world.workers[2, 0].groups]
        assert world.pool.in_flight == 3

    play(scene)


def test_scaling_to_nothing_keeps_groups_for_later() -> None:
    async def scene(world: World) -> None:
        await world.start(2)
        world.submit(0, 1)
        await asyncio.sleep(0.5)
        await world.pool.resize(0)
        for worker in list(world.workers.values()):
            worker.finish_all()
        world.submit(2)
        await asyncio.sleep(5000)
        assert sorted(world.finished()) == [0, 1]
        assert world.pool.count("serving", "starting", "draining") == 0
        assert world.pool.in_flight == 1
        await world.pool.resize(2)
        await asyncio.sleep(1)
        assert world.pool.count("serving") == 2
        assert world.workers[2, 0].groups == [(2, 0)]

    play(scene, workers_timeout_s=600)


# -- prompts that kill -----------------------------------------------------------------------------


def poisoned(*prompts: str) -> Any:
    def change(worker: Worker) -> None:
        worker.poison = set(prompts)

    return change


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("groups", [1, 5])
def test_a_prompt_that_killed_two_workers_is_set_aside_and_no_other(
    workers: int, groups: int
) -> None:
    async def scene(world: World) -> None:
        await world.start(workers)
        world.submit(*range(groups))
        done: list[int] = []
        for _ in range(60):
            await asyncio.sleep(2)
            for worker in list(world.workers.values()):
                if not {given.prompt.id for given in worker.given} & worker.poison:
                    worker.finish_all()
            done += world.finished()
        assert sorted(done) == list(range(groups))
        aside = [detail for kind, detail in world.events if kind == "prompt_set_aside"]
        assert [(detail["prompt"], detail["where"]) for detail in aside] == [
            ("p0", "prompts.jsonl:1")
        ]
        assert "assertion of the engine" in aside[0]["cause"]
        assert world.pool.restarts == 2
        assert world.pool.faults["prompt"] == 1
        world.submit(0)  # it comes again in the next pass
        assert world.finished() == [0]
        assert world.pool.restarts == 2

    play(scene, poisoned("p0"), max_restarts=3)


def test_a_worker_that_a_prompt_has_killed_is_not_given_up_for_it() -> None:
    async def scene(world: World) -> None:
        await world.start(1)
        done: list[int] = []
        for group in range(3):  # each kills it twice
            world.submit(group)
            await asyncio.sleep(60)
            done += world.finished()
        assert done == [0, 1, 2]
        assert world.pool.restarts == 6

    play(scene, poisoned("p0", "p1", "p2"), max_restarts=3)


def test_a_late_group_is_given_out_once_more_and_then_its_prompt_is_set_aside() -> None:
    async def scene(world: World) -> None:
        await world.start(1)
        world.submit(0, 1)
        worker = world.workers[0, 0]
        worker.finish(0, failure="not finished within 7 s", late=True)
        await asyncio.sleep(2)
        assert (0, 1) in worker.groups
        assert world.finished() == []
        worker.finish(0, attempt=1, failure="not finished within 7 s", late=True)
        await asyncio.sleep(2)
        assert world.finished() == [0]
        aside = [detail for kind, detail in world.events if kind == "prompt_set_aside"]
        assert [detail["prompt"] for detail in aside] == ["p0"]
        assert aside[0]["cause"].endswith("too late twice; the last time, not finished within 7 s")
        assert (world.pool.faults["engine"], world.pool.faults["prompt"]) == (2, 1)
        assert world.pool.restarts == 0
        world.submit(0)  # in the next pass
        assert world.finished() == [0]

    play(scene)


def test_a_group_that_is_late_once_is_as_good_as_new() -> None:
    async def scene(world: World) -> None:
        await world.start(1)
        worker = world.workers[0, 0]
        for _ in range(2):
            world.submit(0)
            await asyncio.sleep(1)
            worker.finish(0, failure="slow", late=True)
            await asyncio.sleep(2)
            worker.finish(0, attempt=1)
            await asyncio.sleep(2)
            assert world.finished() == [0]
        assert "prompt_set_aside" not in world.kinds()

    play(scene)


def test_too_many_late_prompts_end_the_run() -> None:
    async def scene(world: World) -> None:
        await world.start(1)
        worker = world.workers[0, 0]
        world.submit(0, 1, 2, 3)
        for attempt in (0, 1):
            for group in range(4):
                worker.finish(group, attempt, failure="slow", late=True)
            await asyncio.sleep(2)
        with pytest.raises(Fatal, match="more than 3 prompts were too late twice"):
            world.finished()

    play(scene)


def test_the_worker_losses_of_a_group_do_not_use_up_its_scoring() -> None:
    async def scene(world: World) -> None:
        await world.start(1)
        world.submit(7)
        for incarnation in range(2):
            await asyncio.sleep(5)
            world.workers[0, incarnation].lost = Retryable("did not answer")
        await asyncio.sleep(5)
        worker = world.workers[0, 2]
        worker.finish(7, attempt=2, failure="the reward service is away")
        await asyncio.sleep(2)
        worker.finish(7, attempt=3)
        await asyncio.sleep(2)
        assert world.finished() == [7]

    play(scene, max_restarts=5)
