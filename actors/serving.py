"""What is in a rollout worker's process: everything that it is made from, and the calls it answers.

Imports neither Ray nor torch: `remote.py` puts it into an actor of Ray, and commands that sample on
one machine start it without Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from actors.decoding import make_decoder
from actors.environment import EngineKind, choose_engine, make_engine, prepare_environment
from actors.settings import EngineSettings, adapter_settings, derive_seed, engine_settings
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.plugins import PluginFile, install
from cluster.contracts.protocols import Scorer
from cluster.contracts.records import (
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


class WorkerProcess:
    """The content of a worker's process. Several threads call it; each method is one call of the
    worker's handle."""

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
        prepare_environment(spec.cores, self._on_gpu(), spec.threads)
        kind, note = choose_engine(spec.kind)
        from actors.rollout import RolloutWorker, WorkerSettings
        from cluster.weights.transports import make_receiver

        device = "cuda" if self._on_gpu() else "cpu"
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
        return info | ({"note": note} if note else {})

    def _on_gpu(self) -> bool:
        """Whether this process was given a GPU."""
        return False

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
