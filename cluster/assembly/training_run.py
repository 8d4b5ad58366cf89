"""A training run on Ray: the roles put together around the controller, driven and ended, until the
policy and the report are there. A run that has to go back to its newest checkpoint does so here."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.assembly.catch_up import NOTHING_SINCE, forget_since
from cluster.assembly.evaluating import evaluation_role
from cluster.assembly.going_back import go_back, go_back_before_the_first_step
from cluster.assembly.head_watch import raise_if_head_lost
from cluster.assembly.learner_role import learner_role
from cluster.assembly.learnt_from import KEY, learnt_from
from cluster.assembly.listeners import ListenedRun, Listeners
from cluster.assembly.otel import traces_of
from cluster.assembly.ray_dashboard import RayTab, ray_tab_of
from cluster.assembly.reward_replicas import RewardRole
from cluster.assembly.room import resource_needs
from cluster.assembly.run_session import RunSession, how_to_continue
from cluster.assembly.shipping import RoleFiles, role_files
from cluster.assembly.training_record import Training
from cluster.assembly.training_roles import reward_role, worker_factory
from cluster.assembly.training_sinks import Monitors, add_sinks, tell_evaluation, tell_prompts
from cluster.assembly.training_watches import RunningRoles, Watches, live_feed, watched
from cluster.contracts.actor_names import ActorNames
from cluster.contracts.config.policies import POLICIES
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import AccordError, RewardsAway, RolledBack, UserError
from cluster.contracts.protocols import Sink
from cluster.loop.controller import Controller
from cluster.loop.ending import GoesBack
from cluster.loop.pool import WorkerPool
from cluster.loop.settings import loop_settings, pool_settings
from cluster.loop.traces import Traces
from cluster.machine.clock import MonotonicClock
from cluster.machine.event_loop import StopSwitch, run_coroutine
from cluster.machine.ray_session import ray_cluster
from cluster.machine.resources import require_resources
from cluster.machine.shipment import known_as
from cluster.pages.ray_tab import LiveBoard
from cluster.runs.checkpoints import Found, step_of, verify_checkpoint
from cluster.runs.control import ControlFile
from cluster.runs.evaluations import best_of
from cluster.runs.policies import ADAPTERS
from cluster.runs.quarantine import quarantined


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a run keeps when it goes back to a checkpoint and its other roles are made anew."""

    rewards: RewardRole
    files: RoleFiles
    listeners: Listeners
    stop: StopSwitch
    traces: Traces | None
    monitors: Monitors


def train_on_ray(training: Training) -> None:
    start = training.session.start
    start.begins("Ray")
    cluster = training.config.cluster
    with ray_tab_of(cluster) as tab, ray_cluster(cluster) as ray_info:
        start.ends("Ray")
        _serve_page(training, tab, ray_info)
        train_in_cluster(training, ray_info)


def _serve_page(training: Training, tab: RayTab, ray_info: Mapping[str, Any]) -> None:
    """The run's page in Ray's dashboard, from now to the end of the run."""
    session, cluster = training.session, training.config.cluster
    if cluster.to_join is None and not cluster.dashboard:
        session.reporter.say(
            "Ray's dashboard with this run's page is off; `cluster.dashboard=true` starts it"
        )
    board = LiveBoard(session.path, str(ray_info["session"]))
    server = tab.serve(board, ray_info["dashboard"])
    if server is not None:
        session.shows.append(board)
        session.addresses["page"] = server.url_with_token
        session.reporter.say(
            f"this run's page, also in the Metrics tab of Ray's dashboard: {server.url_with_token}"
        )


def train_in_cluster(training: Training, ray_info: Mapping[str, Any]) -> None:
    """Everything between a running Ray cluster and a finished ``policy/`` in the run directory."""
    config, session = training.config, training.session
    session.event("cluster", **dict(ray_info))
    session.names = ActorNames(session.path.name, f"accord-{ray_info['job']}")
    if ray_info["dashboard"]:
        session.addresses["dashboard"] = f"http://{ray_info['dashboard']}"
        session.reporter.say(
            f"Ray dashboard: http://{ray_info['dashboard']} (`ray get-auth-token` prints the token "
            "it asks for)"
        )
    require_resources(resource_needs(config), ray_info, session.reporter.say)
    if config.reward.address:
        session.reporter.say(
            f"rewards come from the service at {config.reward.address}; its own sources score, not "
            "the config's reward.sources"
        )
    if not training.resumed:
        session.run.update_manifest(**{KEY: learnt_from(training.prepared)})
        tell_prompts(training.prepared.prompts, session)
        tell_evaluation(training.prepared, session)
    stop = StopSwitch()
    listeners = Listeners(
        training.callbacks,
        session.path,
        steps=config.batch.steps,
        first_step=training.first_step,
        request_stop=stop.ask,
    )
    monitors = add_sinks(training)
    try:
        log_file = session.path / "logs" / "reward.log"
        with (
            role_files(config, ray_info) as files,
            reward_role(config, training.cores, log_file, files, session.names) as rewards,
            traces_of(config.logging, session.path.name, session.reporter.say) as traces,
        ):
            for place, parcel in files.parcels().items():
                session.event(
                    "input_packed", role_and_path=place, bytes=parcel.size, sha256=parcel.digest
                )
            given = Given(
                rewards=rewards,
                files=files,
                listeners=listeners,
                stop=stop,
                traces=traces,
                monitors=monitors,
            )
            _drive_through_rollbacks(training, given)
    except RewardsAway as problem:
        raise RewardsAway(f"{problem}\n  {how_to_continue(session.run)}") from problem
    finally:
        listeners.close()
    if listeners.problem is not None:
        raise listeners.problem
    if session.outcome == "stopped" and session.run.newest_checkpoint() is None:
        return  # stopped before its first step: there is nothing to publish
    newest = session.run.checkpoints.newest_good()
    publish_result(session, config, newest, monitors.actions.result)


def _drive_through_rollbacks(training: Training, given: Given) -> None:
    left, session, monitors = training.config.learner.max_restarts, training.session, given.monitors
    training = go_back_before_the_first_step(training, monitors.actions, monitors.sink)
    while True:
        try:
            return run_coroutine(_drive(training, given), given.stop)
        except GoesBack as wish:
            training = go_back(training, wish.abandoned, monitors.actions, monitors.sink)
        except RolledBack as problem:
            if not left:
                raise
            left -= 1
            resumed = None
            with contextlib.suppress(UserError):  # no checkpoint yet: from the start
                resumed = session.run.checkpoints.newest_good()
            step = resumed.state.step if resumed else 0
            lost = forget_since(session.run, step)
            session.event("rolled_back", step=step, steps_lost=lost, cause=str(problem))
            training = replace(training, resumed=resumed, since=NOTHING_SINCE)


async def _drive(training: Training, given: Given) -> None:
    """Start all roles side by side, train, and end them, whatever happens."""
    config, session = training.config, training.session
    sinks: list[Sink] = [*session.sinks, session.start, given.listeners]
    roles = _put_together(training, given, sinks)
    session.reporter.say(f"  {training.cores.describe()}")
    workers = [f"worker-{index}" for index in range(config.rollout.workers)]
    service = ["reward service"] if roles.rewards.replicas is not None else []
    session.start.begins("learner", *service, *workers)
    with given.stop.bound(roles.controller.request_stop):
        try:
            async with watched(training, roles) as watches:
                await _train(training, given, roles.controller, watches, sinks)
        finally:
            await asyncio.gather(roles.pool.stop(), _stop_learner(roles.learner))
            if faults := ", ".join(f"{n} {fault}" for fault, n in roles.pool.faults.items() if n):
                session.reporter.say(f"faults: {faults} (events.jsonl says which)")


async def _train(
    training: Training, given: Given, controller: Controller, watches: Watches, sinks: list[Sink]
) -> None:
    config, session = training.config, training.session
    try:
        if await controller.start():
            # Its clock begins here, so that what it says of the time left leaves the start out.
            with session.reporter.stage(algorithm_title(config), config.batch.steps) as stage:
                sinks.insert(0, stage)
                await controller.run()
                _tell_stop(training, controller, given.listeners, watches)
        else:
            _tell_stop(training, controller, given.listeners, watches)
    except Exception as problem:
        await raise_if_head_lost(watches.head, session, problem)
        raise


def _put_together(training: Training, given: Given, sinks: list[Sink]) -> RunningRoles:
    """``sinks``: receives one more, and may be added to later."""
    config, session, clock = training.config, training.session, MonotonicClock()
    files, traces = given.files, given.traces
    prompts, learner = training.prepared.prompts, learner_role(training, files)
    first, clients = training.first_step, given.rewards.clients
    make = worker_factory(training.prepared, training.cores, clients, first, files, session.names)
    if traces is not None:
        prompts, learner = traces.of_prompts(prompts), traces.of_learner(learner)
        make = traces.of_workers(make)
    pool = WorkerPool(
        make,
        pool_settings(config),
        clock,
        session.event,
        session.timeline.swap,
        quarantined(session.path),
    )
    pool.weights_come_from(learner.pulse)
    controller = Controller(
        loop_settings(config),
        prompts,
        learner,
        pool,
        ListenedRun(session, given.listeners),
        sinks,
        clock,
        session.timeline,
        state=training.state,
        saved=training.resumed.state.step if training.resumed else 0,
        wishes=ControlFile(session.path, session.event),
        evaluation=evaluation_role(training.prepared, session.path, given.rewards.clients),
        monitors=given.monitors.actions,
    )
    feed = live_feed(training, controller, pool, learner, clock)
    sinks.append(feed)
    return RunningRoles(
        controller=controller,
        pool=pool,
        learner=learner,
        rewards=given.rewards,
        feed=feed,
        clock=clock,
    )


def _tell_stop(
    training: Training, controller: Controller, listeners: Listeners, watches: Watches
) -> None:
    """Raises KeyboardInterrupt when the run was interrupted before its last step, and what keeps
    the reward service from working."""
    session, step = training.session, controller.step
    if watches.reward.done():
        watches.reward.result()
    if controller.stopped_early is not None:
        session.reporter.tell(f"early stop after step {step}: {controller.stopped_early}")
    elif listeners.stopped:
        session.event("stopped_by_callback", step=step)
    elif controller.stopped_as_asked and step < training.config.batch.steps:
        session.event("stopped", step=step)
        session.outcome = "stopped"
        session.reporter.tell(how_to_continue(session.run))
    elif listeners.problem is None and step < training.config.batch.steps:
        if step and session.run.newest_checkpoint() != step:
            session.reporter.say(
                f"the learner was in the middle of a step, so nothing after the last checkpoint "
                f"could be saved; {step} steps had been done"
            )
        raise KeyboardInterrupt


async def _stop_learner(learner: Any) -> None:
    # It may be what failed; that is raised already.
    with contextlib.suppress(AccordError, TimeoutError):
        await asyncio.wait_for(learner.stop(), 5.0)


def algorithm_title(config: TrainConfig) -> str:
    """What a person calls the algorithm: PPO, GRPO, RLOO, ...; the loss where it is another."""
    algorithm = config.algorithm
    name = "PPO" if algorithm.advantage == "gae" else algorithm.advantage.upper()
    return name if algorithm.loss == "ppo" else f"{name} with loss {algorithm.loss}"


def publish_result(
    session: RunSession, config: TrainConfig, newest: Found, monitored: Path | None = None
) -> None:
    """Make ``policy/`` of the newest checkpoint, of the best one where the config says so, or of
    the one (``monitored``) that a monitor has chosen when it stopped the run."""
    chosen = newest.path
    if monitored is not None and verify_checkpoint(monitored) is None:
        chosen = monitored
        step = step_of(chosen.name)
        session.event("policy_published", checkpoint=chosen.name, step=step, result="monitor")
    elif config.evaluation.result == "best":
        chosen = _best_checkpoint(session, newest.path)
        step = step_of(chosen.name)
        session.event("policy_published", checkpoint=chosen.name, step=step, result="best")
        session.reporter.say(f"policy/ is that of step {step}, the best of the evaluations")
    hand_over(chosen, session.path, config)


def _best_checkpoint(session: RunSession, newest: Path) -> Path:
    best = best_of(session.path)
    if best is None:
        session.reporter.say("no evaluation has named a best step, so the newest one counts as it")
        return newest
    path = session.path / best.checkpoint
    if (problem := verify_checkpoint(path)) is None:
        return path
    raise UserError(
        f"the best policy cannot be published: {best.checkpoint}: {problem}",
        where=str(session.path),
        fix=f"accord train --resume {session.path} evaluation.result=last publishes that of "
        f"{newest.name}",
    )


def hand_over(checkpoint: Path, run: Path, config: TrainConfig) -> None:
    """Make `policy/` of a run of its checkpoint; under LoRA also, or instead, `adapter/`; of
    several policies `adapters/NAME/`."""
    if config.lora is None:
        publish_policy(checkpoint / "policy", run / "policy")
        return
    # torch, which the driver needs for nothing else.
    from learner.models.merged_export import hand_over_adapter, write_merged

    base = known_as(config.model.path)
    if config.policies:
        for policy in config.policies:
            saved = checkpoint / POLICIES / policy.name / "adapter"
            hand_over_adapter(saved, base, run / ADAPTERS / policy.name)
        return
    if config.lora.export != "merged":
        hand_over_adapter(checkpoint / "adapter", base, run / "adapter")
    if config.lora.export != "adapter":
        dtype = config.model.dtype
        write_merged(checkpoint / "adapter", config.model, run / "policy", dtype)


def publish_policy(source: Path, target: Path) -> None:
    """Copy the newest checkpoint's policy to ``policy/``, whole or not at all."""
    staging = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(source, staging)
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)


def write_run_report(session: RunSession) -> None:
    from learner.evaluation.report import write_report

    session.reporter.say(f"report: {write_report(session.path)}")
    session.copy_to_mirror()
