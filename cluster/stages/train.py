"""`accord train`: the roles put together around the controller."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.balance import SideBalance
from cluster.contracts.config import TrainConfig
from cluster.contracts.configfile import load_config
from cluster.contracts.errors import AccordError, UserError
from cluster.contracts.protocols import Sink
from cluster.contracts.records import RunState
from cluster.controller import Controller, LoopSettings
from cluster.placement import CorePlan, own_cores, plan_cores, ray_cluster, signal_handlers_kept
from cluster.pool import PoolSettings, WorkerPool
from cluster.progress import Reporter
from cluster.runs import Run
from cluster.sinks import make_sinks
from cluster.stages.common import (
    MonotonicClock,
    engine_settings,
    open_run,
    prompt_room,
    recorded,
    refuse_changes,
)
from cluster.stages.rewards import check_rewards, reward_token
from cluster.stages.status import wanted_workers
from cluster.timeline import Timeline

# What may differ on resume, as it does not change what is learnt.
FREE_ON_RESUME = ("logging", "cluster", "checkpoint", "batch.steps", "rollout.workers")
STOP_S = 3.0  # for the reward service to answer what it is scoring


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is checked before anything starts, so that a mistake leaves nothing behind."""

    config: TrainConfig
    prompts: Any
    tokenizer: Any
    stop_ids: tuple[int, ...]
    tokenizer_fingerprint: str


def train_policy(config: TrainConfig, reporter: Reporter, *, cores: CorePlan | None = None) -> Path:
    """Train; returns the run directory (its ``policy/`` is the result).

    ``cores``: which role runs where, instead of ``plan_cores``' answer.
    """
    prepared = prepare(config)
    run = Run.create(
        config.run.dir,
        config.run.name,
        "train",
        config,
        seed=config.run.seed,
        parents=parents(config),
    )
    if prepared.prompts.skipped:
        reporter.say(f"left out {prepared.prompts.skipped} prompts longer than allowed")
    with run.lock(), recorded(run), ray_cluster(config.cluster) as ray_info:
        train_in_cluster(prepared, run, reporter, ray_info, cores=cores)
    _report(run, reporter)
    return run.path


def resume_training(path: str, overrides: Sequence[str], reporter: Reporter) -> Path:
    """Continue a run from its newest usable checkpoint. Only ``batch.steps`` and settings that do
    not change what was learnt may be given anew."""
    run = open_run(path, "train")
    before = load_config(TrainConfig, str(run.path / "config.toml"))
    config = load_config(TrainConfig, str(run.path / "config.toml"), overrides)
    refuse_changes(before, config, path, FREE_ON_RESUME)
    checkpoint, state = run.latest_checkpoint()
    if state.step >= config.batch.steps:
        raise UserError(
            f"has done its {config.batch.steps} steps",
            where=path,
            fix=f"ask for more: accord train --resume {path} batch.steps={config.batch.steps * 2}",
        )
    prepared = prepare(config)
    if len(prepared.prompts) != state.prompts_total:
        raise UserError(
            f"had {state.prompts_total} prompts when the run began, now {len(prepared.prompts)}: "
            "the order of prompts would not be continued",
            where=config.data.prompts,
            fix="put the file back as it was",
        )
    reporter.say(
        f"resuming at step {state.step} of {config.batch.steps}, prompt {state.next_group}, "
        f"version {state.version}, from {checkpoint.name}"
    )
    with run.lock():
        run.event("resumed", step=state.step, checkpoint=checkpoint.name)
        run.update_manifest(status="running")
        with recorded(run, fresh=False), ray_cluster(config.cluster) as ray_info:
            train_in_cluster(prepared, run, reporter, ray_info, state=state, checkpoint=checkpoint)
    _report(run, reporter)
    return run.path


def _report(run: Run, reporter: Reporter) -> None:
    from learner.evaluation.report import write_report

    reporter.say(f"report: {write_report(run.path)}")


def prepare(config: TrainConfig) -> Prepared:
    """Read tokenizer and prompts, check what can be checked without starting anything."""
    from actors.prompts import load_prompts
    from learner.loading import require_directory
    from learner.models import load_tokenizer, stop_token_ids
    from learner.reward_artifact import read_artifact, tokenizer_fingerprint

    tokenizer = load_tokenizer(config.model)
    room = prompt_room(config.model, config.rollout.max_tokens)
    prompts = load_prompts(config.data, tokenizer, config.run.seed, room)
    check_rewards(config.reward)
    if config.learner.reference_path is not None:
        require_directory(config.learner.reference_path)
    if config.learner.value_path is not None:
        read_artifact(Path(config.learner.value_path))
    return Prepared(
        config=config,
        prompts=prompts,
        tokenizer=tokenizer,
        stop_ids=stop_token_ids(config.model.path, tokenizer),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
    )


def train_in_cluster(
    prepared: Prepared,
    run: Run,
    reporter: Reporter,
    ray_info: Mapping[str, Any],
    *,
    state: RunState | None = None,
    checkpoint: Path | None = None,
    cores: CorePlan | None = None,
) -> None:
    """Everything between a running Ray cluster and a finished ``policy/`` in the run directory."""
    config = prepared.config
    cores = cores or plan_cores(own_cores(), config.rollout.workers, pin=_pins(config))
    run.event("cluster", **dict(ray_info))
    timeline = Timeline()
    # asyncio leaves the default handlers behind, and other stages may follow.
    with run.lock(), signal_handlers_kept(), recorded(run, fresh=state is None):
        sinks = make_sinks(config.logging, run.path, on_ray=True)
        if cores.workers and hasattr(os, "sched_setaffinity"):
            sinks.append(SideBalance(cores))
        try:
            with (
                reward_addresses(config, cores) as addresses,
                reporter.stage(
                    "PPO" if _is_ppo(config) else "training", config.batch.steps
                ) as stage,
            ):
                asyncio.run(
                    _drive(
                        prepared,
                        run,
                        reporter,
                        [*sinks, stage],
                        cores,
                        addresses,
                        timeline,
                        state,
                        checkpoint,
                    )
                )
        finally:
            for sink in sinks:
                sink.close()
            timeline.write(run.path / "timeline.json")
        final, _ = run.latest_checkpoint()
        publish_policy(final / "policy", run.path / "policy")


async def _drive(
    prepared: Prepared,
    run: Run,
    reporter: Reporter,
    sinks: list[Sink],
    cores: CorePlan,
    addresses: RewardAddresses,
    timeline: Timeline,
    state: RunState | None,
    checkpoint: Path | None,
) -> None:
    config = prepared.config
    from learner.remote import RayLearner
    from learner.settings import learner_settings

    first = prepared.prompts.prompt(0)
    learner = RayLearner(
        learner_settings(
            config,
            canary_prompt=first.token_ids,
            run_dir=str(run.path.absolute()),
            resume_from=str(checkpoint.absolute()) if checkpoint else None,
        ),
        core=cores.learner[0] if len(cores.learner) == 1 else None,
        # With as many threads as it has cores in all, each of several processes would be too wide.
        cores=cores.learner if config.learner.processes >= max(len(cores.learner), 2) else (),
        threads=max(1, len(cores.learner) // config.learner.processes),
    )
    pool = WorkerPool(
        _worker_factory(prepared, cores, addresses, state),
        PoolSettings(
            start_timeout_s=config.rollout.start_timeout_s,
            stall_timeout_s=config.rollout.stall_timeout_s,
            weights_timeout_s=config.weights.timeout_s,
            max_restarts=config.rollout.max_restarts,
        ),
        MonotonicClock(),
        _announcing(run, reporter),
        timeline.swap,
    )
    controller = Controller(
        loop_settings(config),
        prepared.prompts,
        learner,
        pool,
        run,
        sinks,
        MonotonicClock(),
        timeline,
        state=state,
        wanted_workers=lambda: wanted_workers(run),
    )
    loop = asyncio.get_running_loop()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, controller.request_stop)
    try:
        reached = await controller.run()
    finally:
        await asyncio.gather(pool.stop(), _stop_learner(learner))
    if reached.step < config.batch.steps:
        if reached.step and not run.checkpoint_dir(reached.step).is_dir():
            reporter.say(
                f"the learner was in the middle of a step, so nothing after the last checkpoint "
                f"could be saved; {reached.step} steps had been done"
            )
        raise KeyboardInterrupt


async def _stop_learner(learner: Any) -> None:
    # It may be what failed; that is raised already.
    with contextlib.suppress(AccordError, TimeoutError):
        await asyncio.wait_for(learner.stop(), 5.0)


def _announcing(run: Run, reporter: Reporter) -> Callable[..., None]:
    """Events go to events.jsonl; what a person should know at once is said, too."""

    def event(kind: str, **detail: Any) -> None:
        run.event(kind, **detail)
        if kind == "worker_serving" and detail.get("note"):
            reporter.say(str(detail["note"]))
        elif kind in ("worker_lost", "worker_not_joined"):
            reporter.say(f"{detail['worker']}: {detail['cause']}")

    return event


def _worker_factory(
    prepared: Prepared, cores: CorePlan, addresses: RewardAddresses, state: RunState | None
) -> Any:
    from actors.remote import WorkerSpec, make_worker_factory

    config = prepared.config
    rollout = config.rollout
    spec = WorkerSpec(
        engine=engine_settings(
            config.model, rollout, prepared.stop_ids, config.data.max_prompt_tokens
        ),
        kind=rollout.engine,
        seed=_sampling_seed(config, state),
        per_request_seeds=rollout.request_seeds,
        transport=config.weights.transport,
        make_scorer=_ClientMaker(
            addresses, config.reward.deadline_s, prepared.tokenizer_fingerprint
        ),
        start_timeout_s=rollout.start_timeout_s,
        weights_timeout_s=config.weights.timeout_s,
        score_batch=config.reward.max_batch,
    )
    return make_worker_factory(
        spec, num_cpus=rollout.cpus, num_gpus=rollout.gpus, cores=cores.worker
    )


def _sampling_seed(config: TrainConfig, state: RunState | None) -> int:
    """A worker's stream begins anew on resume, so it needs another seed there; a sample's own
    randomness does not: a repeated step then repeats what it sampled."""
    resumed_at = state.step if state and not config.rollout.request_seeds else 0
    return config.run.seed + resumed_at


@dataclass(frozen=True, slots=True)
class RewardAddresses:
    """Where rewards are served, and the bearer token for it (kept out of every repr and log)."""

    addresses: tuple[str, ...]
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class _ClientMaker:
    """Makes the reward client in the worker's process."""

    addresses: RewardAddresses
    deadline_s: float
    tokenizer: str

    def __call__(self) -> Any:
        from reward_service.client import RewardClient

        client = RewardClient(
            self.addresses.addresses,
            deadline_s=self.deadline_s,
            token=self.addresses.token,
            tokenizer=self.tokenizer,
        )
        client.connect()
        return client


@contextmanager
def reward_addresses(config: TrainConfig, cores: CorePlan) -> Iterator[RewardAddresses]:
    """The reward service that was given, or one started here for the run.

    A service elsewhere gets the token in the variable ACCORD_REWARD_TOKEN. One started here listens
    on loopback; on a cluster that was joined, where workers may sit on other machines, on its
    node's address with a token made for this run.
    """
    if config.reward.address:
        from reward_service.client import RewardClient

        token = reward_token()
        client = RewardClient([config.reward.address], token=token)
        client.connect()
        client.close()
        yield RewardAddresses((config.reward.address,), token)
        return
    from reward_service.remote import start_reward_service

    core = cores.reward[0] if cores.reward else None
    joined = config.cluster.address is not None
    token = secrets.token_urlsafe(32) if joined else None
    service = start_reward_service(
        config.reward, num_cpus=1, core=core, reach="cluster" if joined else "machine", token=token
    )
    try:
        yield RewardAddresses((service.address,), token)
    finally:
        service.stop(STOP_S)


def loop_settings(config: TrainConfig) -> LoopSettings:
    return LoopSettings(
        steps=config.batch.steps,
        prompts_per_step=config.batch.prompts_per_step,
        samples_per_prompt=config.batch.samples_per_prompt,
        staleness_bound=config.staleness.bound,
        workers=config.rollout.workers,
        checkpoint_every=config.checkpoint.every,
        keep_checkpoints=config.checkpoint.keep,
    )


def publish_policy(source: Path, target: Path) -> None:
    """Copy the newest checkpoint's policy to ``policy/``, whole or not at all."""
    staging = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(source, staging)
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)


def parents(config: TrainConfig) -> dict[str, str]:
    """Lineage: which models this run grew from."""
    found = {"policy": config.model.path, **config.run.parents}
    for source in config.reward.sources:
        if source.type == "model":
            found[f"reward/{source.name}"] = source.path
    return found


def _pins(config: TrainConfig) -> bool:
    """Cores can only be dealt out on a machine of our own."""
    return config.cluster.pin_cores and config.cluster.address is None and not config.rollout.gpus


def _is_ppo(config: TrainConfig) -> bool:
    return config.algorithm.advantage == "gae"
