"""The Ray shell around a rollout worker: an actor, and the asyncio handle the pool holds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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

from actors.decoding import make_decoder
from actors.environment import EngineKind, choose_engine, make_engine, prepare_environment
from actors.settings import EngineSettings, adapter_settings, derive_seed, engine_settings
from cluster.contracts.actor_names import Names, unnamed
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.deadlines import within
from cluster.contracts.errors import AccordError, MachineLost, Retryable, Unexpected, WorkerDied
from cluster.contracts.plugins import PluginFile, install
from cluster.contracts.protocols import Scorer
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
from cluster.contracts.stacks import thread_stacks
from cluster.machine.imports import quick_imports
from cluster.machine.shipment import Shipment

LOST = (RayActorError, GetTimeoutError, ObjectLostError, OutOfMemoryError, WorkerCrashedError)
CAUSE_S = 5.0  # for Ray to learn whether it is the process or its host that is gone


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """Everything a worker is made from, picklable. ``transport`` None: never given weights.

    ``make_scorer`` runs in the worker; None for evaluation, where answers are scored elsewhere.
    ``files``: what it is sent.
    """

    engine: EngineSettings
    kind: EngineKind = "auto"
    seed: int = 0
    per_request_seeds: bool = False
    transport: str | None = "object_store"
    make_scorer: Callable[[], Scorer] | None = None
    cores: tuple[int, ...] = ()
    threads: int | None = None  # of torch on a CPU; None: one for each core
    start_timeout_s: float = 180.0
    weights_timeout_s: float = 120.0
    score_batch: int = 64
    reward_outage_s: float = 300.0
    request_timeout_s: float = 0.0
    plugins: tuple[PluginFile, ...] = ()
    files: Shipment = field(default_factory=Shipment)


def worker_spec(
    config: TrainConfig,
    *,
    stop_ids: tuple[int, ...],
    context: int | None,
    make_scorer: Callable[[], Scorer],
    threads: int,
    first_step: int = 0,
    plugins: tuple[PluginFile, ...] = (),
    files: Shipment | None = None,
) -> WorkerSpec:
    """The workers' part of a training config. ``context``: tokens the model can attend to, None
    unknown; ``first_step``: at which the run is resumed."""
    rollout = config.rollout
    prompt = config.data.max_prompt_tokens
    # A worker's stream begins anew on resume, so it needs another seed there; a sample's own
    # randomness does not: a repeated step then repeats what it sampled.
    seed = config.run.seed + (0 if rollout.request_seeds else first_step)
    engine = engine_settings(config.model, rollout, stop_ids, prompt, context)
    adapters = adapter_settings(config)
    return WorkerSpec(
        # It takes its first weights from the learner, which need not be on its disk; adapters of
        # several policies are served on the model's own weights.
        engine=replace(engine, weights="disk" if adapters else "published", adapters=adapters),
        kind=rollout.engine,
        seed=seed,
        per_request_seeds=rollout.request_seeds,
        transport=config.weights.transport,
        make_scorer=make_scorer,
        start_timeout_s=rollout.start_timeout_s,
        weights_timeout_s=config.weights.timeout_s,
        score_batch=config.reward.max_batch,
        reward_outage_s=config.reward.outage_s,
        request_timeout_s=rollout.request_timeout_s,
        threads=threads,
        plugins=plugins,
        files=files or Shipment(),
    )


class RolloutActor:
    """Runs in the worker's process with several threads; each method is one call of the handle."""

    def __init__(self, spec: WorkerSpec, index: int, incarnation: int) -> None:
        self._spec = spec
        self._name = worker_name(index)
        self._index = index
        self._incarnation = incarnation
        self._worker: Any = None  # made in start(): its imports take seconds

    def placed(self) -> None:
        """Answers when this process runs."""

    def start(self) -> dict[str, Any]:
        """Build the engine from the model on disk; weights of a version come by `load_weights`.
        Seconds of it are in the answer."""
        spec, began = self._spec, time.perf_counter()
        spec.files.check_host()
        install(spec.plugins)
        prepare_environment(spec.cores, bool(ray.get_gpu_ids()), spec.threads)
        kind, note = choose_engine(spec.kind)
        from actors.rollout import RolloutWorker, WorkerSettings
        from cluster.weights.transports import make_receiver

        device = "cuda" if ray.get_gpu_ids() else "cpu"
        seed = derive_seed(spec.seed, "worker", self._index, self._incarnation)
        settings = spec.engine.with_paths(spec.files.here)
        settings = replace(settings, seed=seed)
        with quick_imports():
            decoder = make_decoder(settings)
        self._worker = RolloutWorker(
            lambda: make_engine(kind, settings),
            decoder,
            make_receiver(spec.transport, device) if spec.transport else None,
            spec.make_scorer,
            WorkerSettings(
                name=self._name,
                incarnation=self._incarnation,
                request_seed=spec.seed if spec.per_request_seeds else None,
                start_timeout_s=spec.start_timeout_s,
                swap_timeout_s=spec.weights_timeout_s,
                score_batch=spec.score_batch,
                reward_outage_s=spec.reward_outage_s,
                precision=settings.precision,
                request_timeout_s=spec.request_timeout_s,
                worth_telling=max(1, settings.max_running // 8),
            ),
            lambda: _merger(settings, device),
        )
        info: dict[str, Any] = self._worker.start()
        info |= {"seconds": round(time.perf_counter() - began, 3)}
        info |= {"node": ray.get_runtime_context().get_node_id()}
        return info | ({"note": note} if note else {})

    def submit(self, assignments: Sequence[Assignment]) -> None:
        self._worker.submit(assignments)

    def harvest(self, timeout_s: float) -> tuple[Harvest, Any]:
        """(harvest without its payload, payload): two objects, both owned by the caller.

        So a payload outlives this process, and the controller forwards it without reading it.
        """
        harvest = self._worker.harvest(timeout_s)
        return replace(harvest, payload=None), harvest.payload

    def load_weights(self, manifest: WeightManifest) -> SwapReport:
        return self._worker.load_weights(manifest)

    def sample(
        self, prompts: Sequence[Prompt], samples: int, timeout_s: float, draw: Draw
    ) -> list[Rollout]:
        return self._worker.sample(prompts, samples, timeout_s, draw)

    def stacks(self) -> str:
        return thread_stacks()

    def stop(self) -> None:
        if self._worker is not None:
            self._worker.stop()


def _merger(settings: EngineSettings, device: str) -> Any:
    # torch, which is imported after the environment
    from actors.engines.merging import Merger, Unmerged

    return Merger(settings, device) if settings.adapters is None else Unmerged(settings)


def worker_name(index: int) -> str:
    return f"worker-{index}"


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


async def generate_all(
    workers: Sequence[RayRolloutWorker],
    prompts: Sequence[Prompt],
    samples: int,
    timeout_s: float,
    chunk: int = 32,
) -> list[Rollout]:
    """All samples of all prompts, unscored, in order, shared out to started ``workers`` as they
    become free. The deadline is for the whole. Raises what a worker raises."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    starts = iter(range(0, len(prompts), chunk))
    answers: dict[int, list[Rollout]] = {}

    async def work(worker: RayRolloutWorker) -> None:
        for start in starts:
            part = prompts[start : start + chunk]
            left = max(0.0, deadline - loop.time())
            answers[start] = await worker.sample(part, samples, left)

    # Two at once for each, so that the next chunk is there before the last answer is.
    tasks = [asyncio.create_task(work(worker)) for worker in workers for _ in range(2)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return [rollout for start in sorted(answers) for rollout in answers[start]]
