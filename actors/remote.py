"""The Ray shell around a rollout worker: an actor, and the asyncio handle the pool holds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from actors.serving import WorkerProcess, WorkerSpec, worker_name
from cluster.contracts.actor_names import Names, unnamed
from cluster.contracts.deadlines import within
from cluster.contracts.errors import AccordError, MachineLost, Retryable, Unexpected, WorkerDied
from cluster.contracts.records import (
    AS_TRAINED,
    Assignment,
    Draw,
    Harvest,
    Prompt,
    Rollout,
    SwapReport,
    WeightManifest,
)

LOST = (RayActorError, GetTimeoutError, ObjectLostError, OutOfMemoryError, WorkerCrashedError)
CAUSE_S = 5.0  # for Ray to learn whether it is the process or its host that is gone


class RolloutActor(WorkerProcess):
    """A worker's process, started by Ray."""

    def start(self) -> dict[str, Any]:
        return super().start() | {"node": ray.get_runtime_context().get_node_id()}

    def _on_gpu(self) -> bool:
        return bool(ray.get_gpu_ids())


class RayRolloutWorker:
    """``WorkerHandle`` over a ``RolloutActor``.

    What the actor raised comes back as the same AccordError; a process that is gone or does not
    answer in time is Retryable.
    """

    def __init__(
        self, spec: WorkerSpec, index: int, incarnation: int, options: Mapping[str, Any]
    ) -> None:
        self.name = worker_name(index)
        self.incarnation = incarnation
        self._spec = spec
        # Eight calls at once: a harvest that waits must not hold up a weight update.
        # Not restarted by Ray: the pool does it, and gives the next incarnation another seed.
        kind = ray.remote(RolloutActor).options(max_concurrency=8, max_restarts=0, **options)
        self._actor: Any = kind.remote(spec, index, incarnation)
        self._call_s = 30.0  # over a call's own deadline: Ray's queue, and a node under load
        self._started = False

    async def placed(self) -> None:
        """Ray keeps the actor pending until the cluster has room, and tells its autoscaler."""
        await self._get(self._actor.placed.remote(), None, "begin")

    async def start(self) -> Mapping[str, Any]:
        limit = self._spec.start_timeout_s
        info: Mapping[str, Any] = await self._get(self._actor.start.remote(), limit, "start")
        self._started = True
        return info

    async def submit(self, assignments: Sequence[Assignment]) -> None:
        await self._get(self._actor.submit.remote(list(assignments)), self._call_s, "take work")

    async def harvest(self, timeout_s: float) -> Harvest:
        """``payload`` is ``[reference]``: in a list, so that Ray passes it on unread."""
        both = self._actor.harvest.options(num_returns=2).remote(timeout_s)
        harvest = await self._get(both[0], timeout_s + self._call_s, "hand over its results")
        if all(meta.failure is not None for meta in harvest.groups):
            return harvest
        return replace(harvest, payload=[both[1]])

    async def load_weights(self, manifest: WeightManifest) -> SwapReport:
        limit = self._spec.weights_timeout_s + self._call_s
        what = f"take weights of version {manifest.version}"
        return await self._get(self._actor.load_weights.remote(manifest), limit, what)

    async def sample(
        self, prompts: Sequence[Prompt], samples: int, timeout_s: float, draw: Draw = AS_TRAINED
    ) -> list[Rollout]:
        ref = self._actor.sample.remote(list(prompts), samples, timeout_s, draw)
        return await self._get(ref, timeout_s + self._call_s, f"answer {len(prompts)} prompts")

    async def stacks(self) -> str:
        """What the threads of its process do."""
        return str(await self._get(self._actor.stacks.remote(), None, "tell its stacks"))

    async def stop(self) -> None:
        """Ask it to end, then end it: an actor that hangs must not keep its core.

        One that is still starting has nothing to lose and could not answer for seconds.
        """
        try:
            if self._started:
                await self._get(self._actor.stop.remote(), 5.0, "stop")
        finally:
            ray.kill(self._actor, no_restart=True)

    async def _get(self, ref: Any, timeout_s: float | None, what: str) -> Any:
        try:
            answer = asyncio.wrap_future(ref.future())
            return await (answer if timeout_s is None else within(timeout_s, answer))
        except RayTaskError as problem:
            raise original(problem, self.name) from None
        except ActorUnavailableError as problem:
            raise lost(await self._cause(problem), self.name) from None
        except LOST as problem:
            raise lost(problem, self.name) from None
        except TimeoutError:
            raise Retryable(f"{self.name} did not {what} within {timeout_s:.0f} s") from None

    async def _cause(self, problem: ActorUnavailableError) -> RayActorError:
        """Why the actor cannot be reached: Ray answers another call as soon as it knows."""
        try:
            again = self._actor.placed.remote()
            await within(CAUSE_S, asyncio.wrap_future(again.future()))
        except (ActorUnavailableError, TimeoutError):
            return problem
        except RayActorError as known:
            return known
        return problem  # it was away for a moment; what it was asked for is lost


def lost(problem: BaseException, name: str) -> Retryable:
    """What Ray says of an actor that does not answer any more, as one of our classes."""
    if getattr(problem, "actor_init_failed", False):  # the last line of the trace is the cause
        return Unexpected(f"{name} could not be made: {str(problem).strip().splitlines()[-1]}")
    text = f"{name} is lost: {_said_by_ray(problem)}"
    # "Unavailable" is an actor that cannot be reached, as on a host that is about to be lost.
    gone = getattr(problem, "preempted", False) or "node has died" in str(problem)
    if gone or isinstance(problem, ActorUnavailableError):
        return MachineLost(text)
    return WorkerDied(text) if isinstance(problem, RayActorError) else Retryable(text)


def original(problem: RayTaskError, name: str) -> BaseException:
    """What the remote method raised, as the AccordError it was."""
    cause = problem.cause
    if isinstance(cause, AccordError):
        return cause
    if isinstance(cause, LOST):
        return Retryable(f"{name} lost what it needed: {_said_by_ray(cause)}")
    unexpected = Unexpected(f"{name} failed: {type(cause).__name__}: {cause}")
    unexpected.__cause__ = problem  # with the trace of its process
    return unexpected


def _said_by_ray(problem: BaseException) -> str:
    """One line. Of a dead actor the first says nothing; the last ones say how it ended."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(_FIELDS_OF_AN_ACTOR)]
    if len(told) > 1 and told[0] == ActorDiedError.BASE_ERROR_MSG:
        told = told[1:]
    if not told:
        return type(problem).__name__
    return told[0].partition(" Some common causes include")[0][:300]


_FIELDS_OF_AN_ACTOR = ("class_name:", "actor_id:", "pid:", "name:", "namespace:", "ip:")


def make_worker_factory(
    spec: WorkerSpec,
    *,
    num_cpus: float = 1,
    num_gpus: float = 0,
    cores: Callable[[int], tuple[int, ...]] = lambda index: (),
    resources: Mapping[str, float] | None = None,
    labels: Mapping[str, str] | None = None,
    names: Names = unnamed,
) -> Callable[[int, int], RayRolloutWorker]:
    """(index, incarnation) -> worker, for the pool. ``cores(index)``: the cores it keeps to."""
    options: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus}
    if resources:
        options["resources"] = dict(resources)
    if labels:
        options["label_selector"] = dict(labels)

    def make(index: int, incarnation: int) -> RayRolloutWorker:
        named = options | names(worker_name(index))
        return RayRolloutWorker(replace(spec, cores=cores(index)), index, incarnation, named)

    return make
