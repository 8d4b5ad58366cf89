"""`accord train`: the roles put together around the controller."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster.assembly.auto.resolve import resolve_here
from cluster.assembly.catch_up import (
    NOTHING_SINCE,
    Since,
    forget_since,
    steps_entered,
    steps_since,
)
from cluster.assembly.head_watch import raise_if_head_lost, watch_head
from cluster.assembly.learnt_from import KEY, learnt_from, refuse_other_origins
from cluster.assembly.leaving import LeavingWatch
from cluster.assembly.listeners import ListenedRun, Listeners, check_callbacks
from cluster.assembly.otel import traces_of
from cluster.assembly.prepare import Prepared, prepare, with_pinned_models
from cluster.assembly.ray_dashboard import RayTab, ray_tab_of
from cluster.assembly.resume_rules import FREE_ON_RESUME, MOVABLE, refuse_other_horizon
from cluster.assembly.room import keep_room
from cluster.assembly.run_session import (
    RunSession,
    how_to_continue,
    manifest_of,
    open_run,
    refuse_changes,
    run_session,
    run_status,
)
from cluster.assembly.shipping import RoleFiles, role_files
from cluster.assembly.stall_watch import StallWatch, own_deadlines, processes
from cluster.assembly.training_roles import (
    RewardRole,
    parents,
    resource_needs,
    reward_role,
    worker_factory,
)
from cluster.contracts.actor_names import ActorNames
from cluster.contracts.callbacks import AnyCallback
from cluster.contracts.config.file import load_config
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.crash_points import arm_from
from cluster.contracts.errors import AccordError, RolledBack, UserError
from cluster.contracts.protocols import Clock
from cluster.contracts.records import RunState
from cluster.loop.controller import Controller
from cluster.loop.live import LiveMeter
from cluster.loop.live_feed import LiveFeed, Show
from cluster.loop.pool import WorkerPool
from cluster.loop.settings import loop_settings, pool_settings
from cluster.loop.traces import Traces
from cluster.machine.clock import MonotonicClock
from cluster.machine.core_sharing import SideBalance
from cluster.machine.cores import CorePlan, core_plan, own_cores
from cluster.machine.draining import LeavingNode
from cluster.machine.event_loop import StopSwitch, run_coroutine
from cluster.machine.ray_session import ray_cluster
from cluster.machine.resources import require_resources
from cluster.pages.ray_tab import LiveBoard
from cluster.runs.alarm_sink import AlarmSink
from cluster.runs.checkpoints import Found
from cluster.runs.console import Reporter
from cluster.runs.control import ControlFile
from cluster.runs.live_file import LiveFile
from cluster.runs.quarantine import quarantined
from cluster.runs.rollout_parts import check_parts
from cluster.runs.run import Run
from cluster.runs.sample_sink import SampleSink
from cluster.runs.sinks import RayLiveGauges, make_sinks
from cluster.runs.start_log import StartLog

READING = "model, prompts and rewards"


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One run of the loop: what was checked, the run directory, and where each role computes."""

    prepared: Prepared
    session: RunSession
    cores: CorePlan
    resumed: Found | None = None
    since: Since = NOTHING_SINCE  # steps after the checkpoint, to be trained again from disk
    callbacks: Sequence[AnyCallback] = ()

    @property
    def config(self) -> TrainConfig:
        return self.prepared.config

    @property
    def first_step(self) -> int:
        return self.state.step if self.state else 0

    @property
    def state(self) -> RunState | None:
        """Where the run goes on."""
        if self.resumed is None:
            return None
        return self.since.advance(self.resumed.state, self.config.batch.prompts_per_step)


def train_policy(
    config: TrainConfig,
    reporter: Reporter,
    *,
    cores: CorePlan | None = None,
    callbacks: Sequence[AnyCallback] = (),
    start: StartLog | None = None,
) -> Path:
    """Train; returns the run directory (its ``policy/`` is the result).

    ``cores``: which role runs where, instead of ``core_plan``'s answer. ``start``: of a command
    that did something before.
    """
    check_callbacks(callbacks, save_rollouts=config.logging.save_rollouts)
    arm_from(os.environ)
    start = start or StartLog(reporter)
    # Before Ray: a mistake in what is read then leaves nothing behind, and is said sooner.
    with start.part(READING):
        resolved = resolve_here(with_pinned_models(config))
        config = resolved.config
        prepared = prepare(config)
    run = new_run(config)
    with run_session(run, reporter, start=start) as session:
        session.event("auto", **{key: asdict(why) for key, why in resolved.reasons.items()})
        training = Training(
            prepared=prepared,
            session=session,
            cores=cores or core_plan(config, own_cores()),
            callbacks=callbacks,
        )
        _train_on_ray(training)
    _report(session)
    return run.path


def new_run(config: TrainConfig) -> Run:
    seed, lineage = config.run.seed, parents(config)
    return Run.create(config.run.dir, config.run.name, "train", config, seed=seed, parents=lineage)


def resume_training(
    path: str,
    overrides: Sequence[str],
    reporter: Reporter,
    *,
    callbacks: Sequence[AnyCallback] = (),
) -> Path:
    """Continue a run from its newest usable checkpoint. Only ``batch.steps`` and settings that do
    not change what was learnt may be given anew."""
    arm_from(os.environ)
    start = StartLog(reporter)
    with start.part(READING):
        run = open_run(path, "train")
        before = load_config(TrainConfig, str(run.path / "config.toml"))
        config = load_config(TrainConfig, str(run.path / "config.toml"), overrides)
        origins = manifest_of(run).get(KEY)
        free = FREE_ON_RESUME + (MOVABLE if origins else ())
        refuse_changes(before, config, path, free)
        refuse_other_horizon(before, config, path)
        config = resolve_here(config).config  # a run of an older release lacks newer keys
        resumed = run.checkpoints.newest_good()
        if resumed.state.step >= config.batch.steps:
            return _publish_only(run, resumed, config, start, reporter)
        prepared = prepare(config)
        refuse_other_origins(origins, learnt_from(prepared), config, run.path)
        _refuse_other_prompts(config, resumed.state, len(prepared.prompts))
        since = steps_since(run, config, resumed.state.step, steps_entered(run))
    state = since.advance(resumed.state, config.batch.prompts_per_step)
    step, again = state.step, len(since.steps)
    detail = {"step": step, "checkpoint": resumed.path.name, "trained_again": again}
    with run_session(run, reporter, start=start, resumed=config, **detail) as session:
        _set_aside_damaged(session, resumed, config)
        reporter.say(
            f"resuming at step {step} of {config.batch.steps}, prompt {state.next_group}, "
            f"version {state.version}, from {resumed.path.name}"
            + (f" and the rollouts of the {again} steps since" if again else "")
        )
        cores = core_plan(config, own_cores())
        training = Training(
            prepared=prepared,
            session=session,
            cores=cores,
            resumed=resumed,
            since=since,
            callbacks=callbacks,
        )
        _train_on_ray(training)
    _report(session)
    return run.path


def _set_aside_damaged(session: RunSession, resumed: Found, config: TrainConfig) -> None:
    """Of the checkpoints and rollouts, with a word on each; only now, as the run is locked."""
    session.run.checkpoints.set_aside(resumed.passed_over)
    for damaged, problem in resumed.passed_over.items():
        session.reporter.say(f"passed over {damaged.name}, which is damaged: {problem}")
    if config.logging.save_rollouts:
        parts = check_parts(session.path, resumed.state.step)
        if line := parts.line():
            session.event("rollouts_absent", steps=parts.absent, torn=parts.torn)
            session.reporter.say(line)


def _publish_only(
    run: Run, found: Found, config: TrainConfig, start: StartLog, reporter: Reporter
) -> Path:
    """Of a run whose last checkpoint is there. Raises UserError where its policy is, too."""
    if run_status(run) == "finished":
        more = config.batch.steps * 2
        raise UserError(
            f"has done its {config.batch.steps} steps",
            where=str(run.path),
            fix=f"ask for more: accord train --resume {run.path} batch.steps={more}",
        )
    step = found.state.step
    detail = {"step": step, "checkpoint": found.path.name, "trained_again": 0}
    with run_session(run, reporter, start=start, resumed=config, **detail) as session:
        _set_aside_damaged(session, found, config)
        reporter.say(f"all {step} steps are done; policy/ is made from {found.path.name}")
        publish_policy(found.path / "policy", run.path / "policy")
    _report(session)
    return run.path


def _refuse_other_prompts(config: TrainConfig, state: RunState, count: int) -> None:
    if count != state.prompts_total:
        raise UserError(
            f"had {state.prompts_total} prompts when the run began, now {count}: "
            "the order of prompts would not be continued",
            where=config.data.prompts,
            fix="put the file back as it was",
        )


def tell_prompts(prompts: Any, session: RunSession) -> None:
    """Says which prompts were left out, on the console and in events.jsonl."""
    bad = prompts.left_out
    session.event(
        "rows", prompts=len(prompts), too_long=prompts.skipped, bad=bad.count, first_bad=bad.first
    )
    for line in prompts.left_out_lines():
        session.reporter.say(line)


def _report(session: RunSession) -> None:
    from learner.evaluation.report import write_report

    session.reporter.say(f"report: {write_report(session.path)}")
    session.copy_to_mirror()


def _train_on_ray(training: Training) -> None:
    start = training.session.start
    start.begins("Ray")
    cluster = training.config.cluster
    with ray_tab_of(cluster) as tab, ray_cluster(cluster) as ray_info:
        start.ends("Ray")
        _serve_page(training, tab, ray_info)
        train_in_cluster(training, ray_info)


def _serve_page(training: Training, tab: RayTab, ray_info: Mapping[str, Any]) -> None:
    """The run's page in Ray's dashboard, from now to the end of the run."""
    session = training.session
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
    stop = StopSwitch()
    listeners = Listeners(
        training.callbacks,
        session.path,
        steps=config.batch.steps,
        first_step=training.first_step,
        request_stop=stop.ask,
    )
    _add_sinks(training)
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
            _drive_through_rollbacks(training, rewards, files, listeners, stop, traces)
    finally:
        listeners.close()
    if listeners.problem is not None:
        raise listeners.problem
    if session.outcome == "stopped" and session.run.newest_checkpoint() is None:
        return  # stopped before its first step: there is nothing to publish
    final = session.run.checkpoints.newest_good()
    publish_policy(final.path / "policy", session.path / "policy")


def _drive_through_rollbacks(
    training: Training,
    rewards: RewardRole,
    files: RoleFiles,
    listeners: Listeners,
    stop: StopSwitch,
    traces: Traces | None,
) -> None:
    limit, session = training.config.learner.max_restarts, training.session
    for _ in range(limit):
        try:
            return run_coroutine(_drive(training, rewards, files, listeners, stop, traces), stop)
        except RolledBack as problem:
            resumed = None
            with contextlib.suppress(UserError):  # no checkpoint yet: from the start
                resumed = session.run.checkpoints.newest_good()
            step = resumed.state.step if resumed else 0
            lost = forget_since(session.run, step)
            session.event("rolled_back", step=step, steps_lost=lost, cause=str(problem))
            training = replace(training, resumed=resumed, since=NOTHING_SINCE)
    run_coroutine(_drive(training, rewards, files, listeners, stop, traces), stop)


def _add_sinks(training: Training) -> None:
    config, session = training.config, training.session
    session.sinks += make_sinks(config.logging, session.path, on_ray=True)
    session.sinks.append(
        AlarmSink(
            config.alarms,
            session.run,
            session.reporter,
            samples_per_prompt=config.batch.samples_per_prompt,
            first=training.first_step,
        )
    )
    if config.logging.samples_every and not session.reporter.quiet:
        session.sinks.append(SampleSink(config.logging, session.path, session.reporter))
    if training.cores.crowded and hasattr(os, "sched_setaffinity"):
        session.sinks.append(SideBalance(training.cores))


async def _drive(
    training: Training,
    rewards: RewardRole,
    files: RoleFiles,
    listeners: Listeners,
    stop: StopSwitch,
    traces: Traces | None,
) -> None:
    """Start all roles side by side, train, and end them, whatever happens."""
    config, session = training.config, training.session
    clock = MonotonicClock()
    prompts, learner = training.prepared.prompts, _learner(training, files)
    first, clients = training.first_step, rewards.clients
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
    sinks = [*session.sinks, session.start, listeners]
    controller = Controller(
        loop_settings(config),
        prompts,
        learner,
        pool,
        ListenedRun(session, listeners),
        sinks,
        clock,
        session.timeline,
        state=training.state,
        saved=training.resumed.state.step if training.resumed else None,
        wishes=ControlFile(session.path, session.event),
    )
    feed = _live_feed(training, controller, pool, learner, clock)
    sinks.append(feed)
    session.reporter.say(f"  {training.cores.describe()}")
    workers = [f"worker-{index}" for index in range(config.rollout.workers)]
    service = ["reward service"] if rewards.replicas is not None else []
    session.start.begins("learner", *service, *workers)
    watch = asyncio.ensure_future(_watch_reward_service(config, rewards, session, controller))
    room = asyncio.ensure_future(keep_room(config, session, lambda: pool.wanted))
    leaving = asyncio.ensure_future(
        _watch_leaving_nodes(training, controller, pool, learner, rewards)
    )
    live = asyncio.ensure_future(feed.run())
    head = watch_head(session, controller)
    head_watch = asyncio.ensure_future(head.run())
    stall_watch = asyncio.ensure_future(
        StallWatch(
            timeout_s=config.cluster.stall_timeout_s,
            own=own_deadlines(config),
            folder=session.path,
            loop=controller.facts,
            pool=pool.facts,
            look=feed.look,
            processes=lambda: processes(
                learner, pool.handles(), rewards.replicas.services if rewards.replicas else ()
            ),
            event=session.event,
            end=controller.end,
            clock=clock,
        ).run()
    )
    with stop.bound(controller.request_stop):
        try:
            if await controller.start():
                # Its clock begins here, so that what it says of the time left leaves the start out.
                with session.reporter.stage(algorithm_title(config), config.batch.steps) as stage:
                    sinks.insert(0, stage)
                    await controller.run()
                    _tell_stop(training, controller, listeners, watch)
            else:
                _tell_stop(training, controller, listeners, watch)
        except Exception as problem:
            await raise_if_head_lost(head, session, problem)
            raise
        finally:
            head_watch.cancel()
            stall_watch.cancel()
            watch.cancel()
            room.cancel()
            await asyncio.gather(room, return_exceptions=True)
            leaving.cancel()
            live.cancel()
            await asyncio.gather(live, return_exceptions=True)
            await asyncio.gather(pool.stop(), _stop_learner(learner))
            if faults := ", ".join(f"{n} {fault}" for fault, n in pool.faults.items() if n):
                session.reporter.say(f"faults: {faults} (events.jsonl says which)")


async def _watch_leaving_nodes(
    training: Training, controller: Controller, pool: WorkerPool, learner: Any, rewards: RewardRole
) -> None:
    """What a node that is about to go would take with it is passed on or saved before."""
    session = training.session
    if training.config.cluster.to_join is None:
        return  # the only node is this machine

    def home(node: LeavingNode) -> list[str]:
        scores = rewards.replicas is not None and rewards.replicas.runs_at(node.address)
        roles = ["learner"] * (node.id in learner.nodes) + ["reward service"] * scores
        if roles:
            session.reporter.say(
                f"node {node.name} is about to go, with {' and '.join(roles)}: a checkpoint is "
                "written after the step under way"
            )
        return roles

    watch = LeavingWatch(pool, session.event, home, controller.request_checkpoint)
    await watch.run()


def _live_feed(
    training: Training, controller: Controller, pool: WorkerPool, learner: Any, clock: Clock
) -> LiveFeed:
    """Shows the run while it goes on: to `accord status` and the pages, and to Ray's metrics."""
    session = training.session
    shows: list[Show] = [LiveFile(session.path), *session.shows]
    if training.config.logging.ray_metrics:
        shows.append(RayLiveGauges(session.path.name))
    return LiveFeed(
        LiveMeter(session.path.name, addresses=session.addresses),
        controller.facts,
        pool.facts,
        shows,
        clock,
        session.event,
        learner.pulse,
    )


def _learner(training: Training, files: RoleFiles) -> Any:
    from learner.remote import RayLearner
    from learner.settings import LearnerSettings, learner_settings

    resumed, run = training.resumed, training.session.run
    settings = learner_settings(
        training.config,
        canary_prompt=training.prepared.prompts.prompt(0).token_ids,
        run_dir=str(training.session.path.absolute()),
        resume_from=str(resumed.path.absolute()) if resumed else None,
        files=files.learner,
        replay=training.since.files,
    )
    cores = training.cores

    def successor(before: LearnerSettings, step: int) -> LearnerSettings:
        found = None
        with contextlib.suppress(UserError):  # no checkpoint yet: from the start
            found = run.checkpoints.newest_good()
        # What the lost one did beyond, nobody has heard of: it is done again.
        since = steps_since(run, training.config, found.state.step if found else 0, step)
        return replace(
            before,
            resume_from=str(found.path.absolute()) if found else None,
            replay=since.files,
        )

    return RayLearner(
        settings,
        cores=cores.learner,
        threads=cores.learner_threads,
        names=training.session.names,
        room_timeout_s=training.config.cluster.room_timeout_s or math.inf,
        successor=successor,
    )


async def _watch_reward_service(
    config: TrainConfig, rewards: RewardRole, session: RunSession, controller: Controller
) -> None:
    """Notes when the services have started, and starts one again when it dies. Where one cannot
    work any more, ends the run, with a checkpoint, and raises why."""
    replicas = rewards.replicas
    if replicas is None:  # elsewhere: they are not seen from here
        why = "rewards come from the service at reward.address, which the run did not start"
        controller.on_reward_replicas(
            lambda wanted: session.event("reward_replicas", wanted=wanted, serving=1, cause=why)
        )
        return
    try:
        await replicas.ready()
    except AccordError:
        if config.cluster.to_join is None:
            return  # raised by the workers, which need the service to start
        controller.request_stop()  # they would wait for as long as there may be room some day
        raise
    session.start.ends("reward service")
    controller.on_reward_replicas(replicas.scale)
    try:
        await replicas.keep_up(session.event)
    except AccordError:
        controller.request_stop()
        raise


def _tell_stop(
    training: Training, controller: Controller, listeners: Listeners, watch: asyncio.Future[None]
) -> None:
    """Raises KeyboardInterrupt when the run was interrupted before its last step, and what keeps
    the reward service from working."""
    session, step = training.session, controller.step
    if watch.done():
        watch.result()
    if listeners.stopped:
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


def publish_policy(source: Path, target: Path) -> None:
    """Copy the newest checkpoint's policy to ``policy/``, whole or not at all."""
    staging = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(source, staging)
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)
