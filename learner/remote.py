"""The learner as a Ray actor, and the controller's handle of it.

torch is imported inside the actor, after its process has its cores and thread count.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from cluster.contracts.errors import AccordError, Fatal, Retryable
from cluster.contracts.records import StepInput, StepResult, WeightManifest
from learner.settings import NODE_HOST, LearnerSettings

T = TypeVar("T")

_PAYLOAD_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 130.0
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class LearnerActor:
    """Runs in its own process. One call at a time, in order."""

    def __init__(self, settings: LearnerSettings, core: int | None, threads: int) -> None:
        if core is not None and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {core})
        # More threads than cores make small products many times slower, and torch reads this once.
        os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
        from learner.ppo import PPOLearner

        if settings.host == NODE_HOST:
            settings = dataclasses.replace(settings, host=ray.util.get_node_ip_address())
        self._learner = PPOLearner(settings, threads=threads)

    def pid(self) -> int:
        return os.getpid()

    def start(self) -> WeightManifest:
        return self._learner.start()

    def step(self, batch: StepInput) -> StepResult:
        tables = tuple(_resolve(payload) for payload in batch.payloads)
        return self._learner.step(dataclasses.replace(batch, payloads=tables))

    def save(self, directory: str) -> None:
        self._learner.save(directory)

    def close(self) -> None:
        self._learner.close()


def _resolve(payload: Any) -> Any:
    """[reference] -> its Arrow table. A list, because Ray would fetch a bare one for the sender."""
    if not isinstance(payload, list):
        return payload
    try:
        return ray.get(payload[0], timeout=_PAYLOAD_TIMEOUT_S)
    except GetTimeoutError:
        raise Retryable(f"rollouts did not arrive within {_PAYLOAD_TIMEOUT_S:.0f} s") from None
    except RayError as problem:
        raise Retryable(f"rollouts are lost with the worker that held them: {problem}") from None


class RayLearner:
    """LearnerHandle of a learner in a Ray actor. Errors of Accord arrive as they were raised.

    core: the CPU it keeps to, or None. threads: of its torch.
    options: more options of the actor, such as a scheduling strategy.
    """

    def __init__(
        self,
        settings: LearnerSettings,
        *,
        core: int | None = None,
        threads: int = 1,
        options: dict[str, Any] | None = None,
    ) -> None:
        self._settings = settings
        self._core, self._threads = core, threads
        self._options = dict(options or {})
        self._actor: Any = None

    async def start(self) -> WeightManifest:
        """Start the process, load the models, publish. Deadline: `learner.start_timeout_s`."""
        learner = self._settings.learner
        options = {"num_cpus": learner.cpus, "num_gpus": learner.gpus, "max_restarts": 0}
        make = ray.remote(LearnerActor).options(**{**options, **self._options})
        self._actor = make.remote(self._settings, self._core, self._threads)
        limit = learner.start_timeout_s
        manifest: WeightManifest = await self._call("start", limit, "to load its models")
        return manifest

    async def step(self, batch: StepInput) -> StepResult:
        """One learner step. Deadline: `learner.step_timeout_s`. Raises Retryable when a payload is
        gone with its worker: the step has then changed nothing and may be asked for again."""
        limit = self._settings.learner.step_timeout_s
        result: StepResult = await self._call("step", limit, f"for step {batch.step}", batch)
        return result

    async def save(self, directory: str) -> None:
        limit = self._settings.learner.step_timeout_s
        await self._call("save", limit, f"to write the checkpoint {directory}", directory)

    async def stop(self) -> None:
        """Let it finish writing, then end its process. Raises what the last writing met."""
        if self._actor is None:
            return
        try:
            await self._call("close", _STOP_TIMEOUT_S, "to finish writing")
        finally:
            self._end()

    async def _call(self, method: str, limit_s: float, purpose: str, *args: Any) -> Any:
        if self._actor is None:
            raise Fatal(f"the learner was asked to {method} but is not running")
        reference = getattr(self._actor, method).remote(*args)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(reference.future()), limit_s)
        except TimeoutError:
            self._end()
            raise Fatal(f"waited {limit_s:.0f} s for the learner {purpose}; it was ended") from None
        except RayTaskError as problem:
            raise _original(problem, method) from None
        except RayActorError as problem:
            self._actor = None
            raise Fatal(f"the learner's process died while asked to {method}: {problem}") from None
        except RayError as problem:
            raise Fatal(f"Ray lost the learner's answer to {method}: {problem}") from problem

    def _end(self) -> None:
        actor, self._actor = self._actor, None
        if actor is not None:
            ray.kill(actor, no_restart=True)


def _original(problem: RayTaskError, method: str) -> AccordError:
    """What the learner raised, not what Ray made of it."""
    if isinstance(problem.cause, AccordError):
        return problem.cause
    # Its text is the traceback; its other attributes are those of the cause.
    return Fatal(f"the learner failed in {method}:\n{problem}")
