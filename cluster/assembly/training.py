"""`accord train`: the roles put together around the controller."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.assembly.auto.resolve import resolve_here
from cluster.assembly.listeners import ListenedRun, Listeners, check_callbacks
from cluster.assembly.prepare import Prepared, prepare
from cluster.assembly.run_session import open_run, recorded, refuse_changes
from cluster.assembly.training_roles import (
    RewardAddresses,
    parents,
    reward_addresses,
    worker_factory,
)
from cluster.contracts.callbacks import AnyCallback
from cluster.contracts.config.file import load_config
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import AccordError, UserError
from cluster.contracts.protocols import Sink
from cluster.contracts.records import RunState
from cluster.loop.controller import Controller
from cluster.loop.pool import WorkerPool
from cluster.loop.settings import loop_settings, pool_settings
from cluster.loop.timeline import Timeline
from cluster.machine.clock import MonotonicClock
from cluster.machine.core_sharing import SideBalance
from cluster.machine.cores import CorePlan, core_plan, own_cores
from cluster.machine.event_loop import StopSwitch, run_coroutine
from cluster.machine.ray_session import ray_cluster
from cluster.machine.signals import signal_handlers_kept
from cluster.runs.alarm_sink import AlarmSink
from cluster.runs.console import Reporter
from cluster.runs.control import wanted_workers
from cluster.runs.run import Run
from cluster.runs.sample_sink import SampleSink
from cluster.runs.sinks import make_sinks

# What may differ on resume, as it does not change what is learnt.
FREE_ON_RESUME = (
    *("logging", "alarms", "cluster", "checkpoint", "batch.steps", "rollout.workers"),
    *("rollout.cpus", "learner.cpus", "rollout.kv_cache_mb", "rollout.max_running"),
)
STOP_S = 3.0  # for the reward service to answer what it is scoring


def train_policy(
    config: TrainConfig,
    reporter: Reporter,
    *,
    cores: CorePlan | None = None,
    callbacks: Sequence[AnyCallback] = (),
) -> Path:
    """Train; returns the run directory (its ``policy/`` is the result).

    ``cores``: which role runs where, instead of ``core_plan``'s answer.
    """
    check_callbacks(callbacks, save_rollouts=config.logging.save_rollouts)
    resolved = resolve_here(config)
    config = resolved.config
    prepared = prepare(config)
    run = Run.create(
        config.run.dir,
        config.run.name,
        "train",
        config,
        seed=config.run.seed,
        parents=parents(config),
    )
    run.event("auto", **{key: asdict(reason) for key, reason in resolved.reasons.items()})
    tell_prompts(prepared.prompts, run, reporter)
    with run.lock(), recorded(run), ray_cluster(config.cluster) as ray_info:
        train_in_cluster(prepared, run, reporter, ray_info, cores=cores, callbacks=callbacks)
    _report(run, reporter)
    return run.path


def tell_prompts(prompts: Any, run: Run, reporter: Reporter) -> None:
    """Says which prompts were left out, on the console and in events.jsonl."""
    bad = prompts.left_out
    run.event(
        "rows", prompts=len(prompts), too_long=prompts.skipped, bad=bad.count, first_bad=bad.first
    )
    if prompts.skipped:
        reporter.say(f"left out {prompts.skipped} prompts longer than allowed")
    if bad.count:
        reporter.say(str(bad))


def resume_training(
    path: str,
    overrides: Sequence[str],
    reporter: Reporter,
    *,
    callbacks: Sequence[AnyCallback] = (),
) -> Path:
    """Continue a run from its newest usable checkpoint. Only ``batch.steps`` and settings that do
    not change what was learnt may be given anew."""
    run = open_run(path, "train")
    before = load_config(TrainConfig, str(run.path / "config.toml"))
    config = load_config(TrainConfig, str(run.path / "config.toml"), overrides)
    refuse_changes(before, config, path, FREE_ON_RESUME)
    config = resolve_here(config).config  # a run of an older release lacks newer keys
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
        run.resume(config, step=state.step, checkpoint=checkpoint.name)
        with recorded(run, fresh=False), ray_cluster(config.cluster) as ray_info:
            train_in_cluster(
                prepared,
                run,
                reporter,
                ray_info,
                state=state,
                checkpoint=checkpoint,
                callbacks=callbacks,
            )
    _report(run, reporter)
    return run.path


def _report(run: Run, reporter: Reporter) -> None:
    from learner.evaluation.report import write_report

    reporter.say(f"report: {write_report(run.path)}")


def train_in_cluster(
    prepared: Prepared,
    run: Run,
    reporter: Reporter,
    ray_info: Mapping[str, Any],
    *,
    state: RunState | None = None,
    checkpoint: Path | None = None,
    cores: CorePlan | None = None,
    callbacks: Sequence[AnyCallback] = (),
) -> None:
    """Everything between a running Ray cluster and a finished ``policy/`` in the run directory."""
    config = prepared.config
    cores = cores or core_plan(config, own_cores())
    run.event("cluster", **dict(ray_info))
    timeline = Timeline()
    stop = StopSwitch()
    listeners = Listeners(
        callbacks,
        run.path,
        steps=config.batch.steps,
        first_step=state.step if state else 0,
        request_stop=stop.ask,
    )
    # asyncio leaves the default handlers behind, and other stages may follow.
    with run.lock(), signal_handlers_kept(), recorded(run, fresh=state is None):
        sinks = make_sinks(config.logging, run.path, on_ray=True)
        sinks.append(
            AlarmSink(
                config.alarms,
                run,
                reporter,
                samples_per_prompt=config.batch.samples_per_prompt,
                first=state.step if state else 0,
            )
        )
        if config.logging.samples_every and not reporter.quiet:
            sinks.append(SampleSink(config.logging, run.path, reporter))
        if cores.crowded and hasattr(os, "sched_setaffinity"):
            sinks.append(SideBalance(cores))
        try:
            with (
                reward_addresses(config, cores) as addresses,
                reporter.stage(
                    "PPO" if _is_ppo(config) else "training", config.batch.steps
                ) as stage,
            ):
                run_coroutine(
                    _drive(
                        prepared,
                        run,
                        reporter,
                        [*sinks, stage, listeners],
                        cores,
                        addresses,
                        timeline,
                        state,
                        checkpoint,
                        listeners,
                        stop,
                    ),
                    stop,
                )
        finally:
            for sink in sinks:
                sink.close()
            timeline.write(run.path / "timeline.json")
            listeners.close()
        if listeners.problem is not None:
            raise listeners.problem
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
    listeners: Listeners,
    stop: StopSwitch,
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
        cores=cores.learner,
        threads=cores.learner_threads,
    )
    pool = WorkerPool(
        worker_factory(prepared, cores, addresses, state),
        pool_settings(config),
        MonotonicClock(),
        _announcing(run, reporter),
        timeline.swap,
    )
    controller = Controller(
        loop_settings(config),
        prepared.prompts,
        learner,
        pool,
        ListenedRun(run, listeners),
        sinks,
        MonotonicClock(),
        timeline,
        state=state,
        wanted_workers=lambda: wanted_workers(run),
    )
    stop.bind(controller.request_stop)
    try:
        reached = await controller.run()
    finally:
        await asyncio.gather(pool.stop(), _stop_learner(learner))
    if listeners.stopped:
        run.event("stopped_by_callback", step=reached.step)
    elif listeners.problem is None and reached.step < config.batch.steps:
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


def publish_policy(source: Path, target: Path) -> None:
    """Copy the newest checkpoint's policy to ``policy/``, whole or not at all."""
    staging = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(source, staging)
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)


def _is_ppo(config: TrainConfig) -> bool:
    return config.algorithm.advantage == "gae"
