"""The learner in a real Ray actor: results, errors as raised, deadlines, death, lost payloads."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pytest
import ray
from ray.exceptions import RayError
from transformers import AutoModelForCausalLM

from cluster.contracts.durable import digests_below
from cluster.contracts.errors import Fatal, Retryable, UserError
from cluster.contracts.metrics import values
from cluster.contracts.records import StepInput, WeightManifest
from cluster.weights.intake import Intake
from cluster.weights.object_store import ObjectStoreReceiver
from learner.remote.handle import RayLearner

pytestmark = pytest.mark.slow
T = TypeVar("T")
GROUPS = (0, 1, 2, 3)


def _run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def table(world: ModuleType, tiny: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    return world.table_of(world.make_groups(model, seed=1))


def test_a_step_a_lost_payload_a_deadline_and_death(
    world: ModuleType, tiny: Path, table: Any, tmp_path: Path
) -> None:
    cores = sorted(os.sched_getaffinity(0))[:1] if hasattr(os, "sched_getaffinity") else []
    settings = world.make_settings(tiny, learner={"stream_parts": 2})
    learner = RayLearner(settings, cores=cores)

    async def live() -> tuple[WeightManifest, Any]:
        started = await learner.start()
        lost = await _lost_payload(table)
        learner.fetch_ahead((lost,))  # says nothing: the step does
        await learner.work_ahead(StepInput(step=0, group_ids=(0, 1), payloads=(lost,)))  # as little
        with pytest.raises(Retryable, match="lost with the worker"):
            await learner.step(StepInput(step=0, group_ids=GROUPS, payloads=(lost,)))
        good = StepInput(step=0, group_ids=GROUPS, payloads=([ray.put(table)],))
        learner.fetch_ahead(good.payloads)
        await learner.work_ahead(StepInput(step=0, group_ids=(2, 3), payloads=good.payloads))
        result = await learner.step(good)
        with pytest.raises(Fatal, match="step 0 was asked of a learner at version 1"):
            await learner.step(good)
        await learner.snapshot()
        files = await learner.store(str(tmp_path / "checkpoint"))
        assert files == digests_below(tmp_path / "checkpoint")
        return started, result

    started, result = _run(live())
    assert (started.version, result.version) == (0, 1)
    found = values(result.metrics)
    assert found["perf/learner_busy_s"] > found["time/step"]  # it worked ahead, too
    assert found["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert dict(Intake(ObjectStoreReceiver(), 30.0).take(result.manifest))
    assert (tmp_path / "checkpoint" / "policy" / "config.json").exists()

    async def die() -> None:
        os.kill(await _as_future(learner._processes.actors[0].pid.remote()), signal.SIGKILL)
        with pytest.raises(Fatal, match="process died while asked to snapshot"):
            await learner.snapshot()
        with pytest.raises(Fatal, match="is not running"):
            await learner.store(str(tmp_path / "never"))
        await learner.stop()

    _run(die())


def test_two_processes_are_one_learner_and_end_together(
    world: ModuleType, tiny: Path, table: Any, tmp_path: Path
) -> None:
    two = {"processes": 2, "sharding": "fsdp2"}
    learner = RayLearner(world.make_settings(tiny, learner=two))
    single = RayLearner(world.make_settings(tiny))
    good = StepInput(step=0, group_ids=GROUPS, payloads=([ray.put(table)],))

    async def live() -> tuple[Any, Any]:
        await learner.start()
        lost = StepInput(step=0, group_ids=GROUPS, payloads=(await _lost_payload(table),))
        with pytest.raises(Retryable, match="lost with the worker"):
            await learner.step(lost)
        result = await learner.step(good)
        # All meet this fault by themselves, so nobody is left waiting and nothing has to end.
        with pytest.raises(Fatal, match="step 0 was asked of a learner at version 1"):
            await learner.step(good)
        await learner.snapshot()
        await learner.store(str(tmp_path / "two"))
        await single.start()
        alone = await single.step(good)
        await single.stop()
        return result, alone

    async def die() -> None:
        second = learner._processes.actors[1]
        os.kill(await _as_future(second.pid.remote()), signal.SIGKILL)
        again = StepInput(step=1, group_ids=GROUPS, payloads=good.payloads)
        with pytest.raises(Fatal, match="process died while asked to"):
            await learner.step(again)
        assert learner._processes.actors == []
        await learner.stop()

    result, alone = _run(live())
    ours, theirs = values(result.metrics), values(alone.metrics)
    for name in ("policy/loss", "policy/grad_norm", "value/loss", "objective/entropy"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    assert (tmp_path / "two" / "policy" / "config.json").exists()
    _run(die())


def test_a_users_error_arrives_as_raised(world: ModuleType, tiny: Path) -> None:
    learner = RayLearner(world.make_settings(tiny, learner={"reference_path": "/nowhere/at/all"}))
    with pytest.raises(UserError, match="no such model directory") as caught:
        _run(learner.start())
    assert caught.value.where == "/nowhere/at/all"
    _run(learner.stop())


def test_a_fault_of_the_learner_s_own_arrives_with_its_traceback(
    world: ModuleType, tiny: Path
) -> None:
    learner = RayLearner(world.make_settings(tiny))
    nonsense = StepInput(step=0, group_ids=GROUPS, payloads=None)  # type: ignore[arg-type]

    async def live() -> None:
        await learner.start()
        try:
            await learner.step(nonsense)
        finally:
            await learner.stop()

    with pytest.raises(Fatal, match=r"the learner failed in step:(.|\n)*TypeError: 'NoneType'"):
        _run(live())


def test_a_deadline_names_what_was_waited_for_and_ends_the_process(
    world: ModuleType, tiny: Path
) -> None:
    learner = RayLearner(world.make_settings(tiny, learner={"start_timeout_s": 0.05}))
    with pytest.raises(Fatal, match="for the learner to load its models; it was ended"):
        _run(learner.start())
    assert learner._processes.actors == []


class _Holder:
    def put(self, table: Any) -> list[Any]:
        return [ray.put(table)]


async def _lost_payload(table: Any) -> list[Any]:
    """A reference whose owner is dead, once Ray knows it."""
    holder = ray.remote(_Holder).remote()
    payload = await _as_future(holder.put.remote(table))
    ray.kill(holder)
    for _ in range(300):
        try:
            ray.get(payload[0], timeout=1)
        except RayError:
            return payload
        await asyncio.sleep(0.1)
    raise AssertionError("Ray still hands out an object 30 s after its owner was killed")


async def _as_future(reference: Any) -> Any:
    return await asyncio.wait_for(asyncio.wrap_future(reference.future()), 60)
