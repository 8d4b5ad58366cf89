"""`accord train`: a new run, from its config to its report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cluster.assembly.auto.resolve import resolve_here
from cluster.assembly.forked_roles import forked_roles
from cluster.assembly.listeners import check_callbacks
from cluster.assembly.prepare import prepare, with_pinned_models
from cluster.assembly.run_session import run_session
from cluster.assembly.training_record import READING, Training
from cluster.assembly.training_roles import parents
from cluster.assembly.training_run import train_on_ray, write_run_report
from cluster.contracts.callbacks import AnyCallback
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.crash_points import arm_from
from cluster.machine.cores import CorePlan, core_plan, own_cores
from cluster.runs.console import Reporter
from cluster.runs.run import Run
from cluster.runs.start_log import StartLog


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
    with forked_roles(config.cluster, compiled=config.learner.compile):
        return _train(config, reporter, cores, callbacks, start)


def _train(
    config: TrainConfig,
    reporter: Reporter,
    cores: CorePlan | None,
    callbacks: Sequence[AnyCallback],
    start: StartLog,
) -> Path:
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
        train_on_ray(training)
    write_run_report(session)
    return run.path


def new_run(config: TrainConfig) -> Run:
    seed, lineage = config.run.seed, parents(config)
    return Run.create(config.run.dir, config.run.name, "train", config, seed=seed, parents=lineage)
