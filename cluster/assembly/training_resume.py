"""`accord train --resume`: a run goes on from its newest checkpoint and the rollouts since."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cluster.assembly.auto.resolve import resolve_here
from cluster.assembly.catch_up import steps_entered, steps_since
from cluster.assembly.forked_roles import forked_roles
from cluster.assembly.learnt_from import KEY, learnt_from, refuse_other_origins
from cluster.assembly.prepare import prepare
from cluster.assembly.resume_rules import FREE_ON_RESUME, MOVABLE, refuse_other_horizon
from cluster.assembly.run_session import (
    RunSession,
    manifest_of,
    open_run,
    refuse_changes,
    run_session,
    run_status,
)
from cluster.assembly.training_record import READING, Training, start_of
from cluster.assembly.training_roles import parents
from cluster.assembly.training_run import publish_result, train_on_ray, write_run_report
from cluster.contracts.callbacks import AnyCallback
from cluster.contracts.config.file import load_config
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.crash_points import arm_from
from cluster.contracts.errors import UserError
from cluster.contracts.records import RunState
from cluster.machine.cores import core_plan, own_cores
from cluster.runs.checkpoints import Found
from cluster.runs.console import Reporter
from cluster.runs.evaluations import evaluations_of
from cluster.runs.rollout_parts import check_parts
from cluster.runs.run import Run
from cluster.runs.start_log import StartLog


def resume_training(
    path: str,
    overrides: Sequence[str],
    reporter: Reporter,
    *,
    callbacks: Sequence[AnyCallback] = (),
) -> Path:
    """Continue a run from its newest usable checkpoint, or from its start before the first one.
    Only ``batch.steps`` and settings that do not change what was learnt may be given anew."""
    arm_from(os.environ)
    config = load_config(TrainConfig, str(open_run(path, "train").path / "config.toml"), overrides)
    with forked_roles(config.cluster, compiled=config.learner.compile):
        return _go_on(path, config, reporter, callbacks)


def _go_on(
    path: str, config: TrainConfig, reporter: Reporter, callbacks: Sequence[AnyCallback]
) -> Path:
    start = StartLog(reporter)
    with start.part(READING):
        run = open_run(path, "train")
        before = load_config(TrainConfig, str(run.path / "config.toml"))
        origins = manifest_of(run).get(KEY)
        free = FREE_ON_RESUME + (MOVABLE if origins else ())
        refuse_changes(before, config, path, free)
        refuse_other_horizon(before, config, path)
        config = resolve_here(config).config  # a run of an older release lacks newer keys
        resumed = run.checkpoints.newest_good() if run.newest_checkpoint() is not None else None
        if resumed is not None and _nothing_left(run, resumed, config):
            return _publish_only(run, resumed, config, start, reporter)
        prepared = prepare(config)
        refuse_other_origins(origins, learnt_from(prepared), config, run.path)
        begun = resumed.state if resumed else start_of(len(prepared.prompts))
        _refuse_other_prompts(config, begun, len(prepared.prompts))
        since = steps_since(run, config, begun.step, steps_entered(run))
    state = since.advance(begun, config.batch.prompts_per_step)
    step, again = state.step, len(since.steps)
    origin = resumed.path.name if resumed else "the start"
    detail = {"step": step, "checkpoint": origin, "trained_again": again}
    with run_session(run, reporter, start=start, resumed=config, **detail) as session:
        _set_aside_damaged(session, resumed, config)
        reporter.say(
            f"resuming at step {step} of {config.batch.steps}, prompt {state.next_group}, "
            f"version {state.version}, from {origin}"
            + (f" and the rollouts of the {again} steps since" if again else "")
        )
        run.update_manifest(parents=parents(config))  # files may have moved
        cores = core_plan(config, own_cores())
        training = Training(
            prepared=prepared,
            session=session,
            cores=cores,
            resumed=resumed,
            since=since,
            callbacks=callbacks,
        )
        train_on_ray(training)
    write_run_report(session)
    return run.path


def _set_aside_damaged(session: RunSession, resumed: Found | None, config: TrainConfig) -> None:
    """Of the checkpoints and rollouts, with a word on each; only now, as the run is locked."""
    passed_over = resumed.passed_over if resumed else {}
    session.run.checkpoints.set_aside(passed_over)
    for damaged, problem in passed_over.items():
        session.reporter.say(f"passed over {damaged.name}, which is damaged: {problem}")
    if config.logging.save_rollouts:
        state = resumed.state if resumed else start_of(0)
        given_up = {int(row["step"]) for row in state.rollbacks}
        parts = check_parts(session.path, state.step, given_up)
        if line := parts.line():
            session.event("rollouts_absent", steps=parts.absent, torn=parts.torn)
            session.reporter.say(line)


def _nothing_left(run: Run, found: Found, config: TrainConfig) -> bool:
    """Whether all steps are done, and the last one is evaluated."""
    step = found.state.step
    evaluated = any(row.step == step for row in evaluations_of(run.path))
    lacks_evaluation = config.evaluation.every > 0 and step > 0 and not evaluated
    return step >= config.batch.steps and not lacks_evaluation


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
        reporter.say(f"all {step} steps are done; policy/ is made from the checkpoints")
        publish_result(session, config, found)
    write_run_report(session)
    return run.path


def _refuse_other_prompts(config: TrainConfig, state: RunState, count: int) -> None:
    if count != state.prompts_total:
        raise UserError(
            f"had {state.prompts_total} prompts when the run began, now {count}: "
            "the order of prompts would not be continued",
            where=config.data.prompts,
            fix="put the file back as it was",
        )
