"""What writes down a training run: metrics, alarms, samples, and which prompts were left out."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import Any

from cluster.assembly.core_record import costs_key, known_costs, write_costs
from cluster.assembly.prepare import Prepared
from cluster.assembly.run_session import RunSession
from cluster.assembly.training_record import Training
from cluster.machine.core_sharing import CoreSharing
from cluster.machine.cores import own_cores
from cluster.machine.placement import places
from cluster.runs.monitor_actions import MonitorActions
from cluster.runs.monitor_sink import MonitorSink
from cluster.runs.sample_sink import SampleSink
from cluster.runs.sinks import make_sinks


@dataclass(frozen=True, slots=True)
class Monitors:
    """What watches a run, and what it does to it."""

    sink: MonitorSink
    actions: MonitorActions


def add_sinks(training: Training) -> Monitors:
    config, session = training.config, training.session
    session.sinks += make_sinks(config.logging, session.path, on_ray=True)
    monitors = _monitors(training)
    session.sinks.append(monitors.sink)
    if config.logging.samples_every and not session.reporter.quiet:
        session.sinks.append(SampleSink(config.logging, session.path, session.reporter))
    # In a synchronous run workers and learner take turns: a core is free at every moment, and the
    # operating system finds it.
    if config.staleness.bound and places(training.cores) and hasattr(os, "sched_setaffinity"):
        session.sinks.append(_core_sharing(training))
    return monitors


def _core_sharing(training: Training) -> CoreSharing:
    config, session, cores = training.config, training.session, own_cores()
    known, key = known_costs(config, cores), costs_key(config, cores)
    session.event("core_costs_known", known=known.costs is not None, source=known.source)
    return CoreSharing(
        training.cores,
        event=session.event,
        record=partial(write_costs, session.path, key),
        known=known.costs,
    )


def _monitors(training: Training) -> Monitors:
    config, session, state = training.config, training.session, training.state
    rollbacks = [int(row["step"]) for row in state.rollbacks] if state else []
    actions = MonitorActions(
        config.monitors,
        session.path,
        steps=config.batch.steps,
        rollbacks=len(rollbacks),
        coefficient=config.algorithm.kl.coef,
    )
    sink = MonitorSink(
        config.monitors,
        session.run,
        session.reporter,
        actions,
        samples_per_prompt=config.batch.samples_per_prompt,
        first=training.first_step,
        rollbacks=rollbacks,
    )
    if line := config.monitors.acting_line():
        session.reporter.say(line)
    return Monitors(sink, actions)


def tell_evaluation(prepared: Prepared, session: RunSession) -> None:
    """Says how the policy will be evaluated while it trains."""
    config = prepared.config.evaluation
    if not config.every:
        return
    judged = "by the run's own reward"
    if config.judge is not None:
        judged = "by " + ", ".join(source.name for source in config.judge.sources)
    session.reporter.say(
        f"evaluation every {config.every} steps with {len(prepared.held_out)} held-out prompts of "
        f"{config.prompts}, judged {judged}"
    )
    if prepared.leaked:
        session.event("evaluation_prompts_leaked", left_out=prepared.leaked, file=config.prompts)
        session.reporter.say(
            f"left out {prepared.leaked} of its prompts: they are also in "
            f"{prepared.config.data.prompts}"
        )


def tell_prompts(prompts: Any, session: RunSession) -> None:
    """Says which prompts were left out, on the console and in events.jsonl."""
    bad = prompts.left_out
    session.event(
        "rows", prompts=len(prompts), too_long=prompts.skipped, bad=bad.count, first_bad=bad.first
    )
    for line in prompts.left_out_lines():
        session.reporter.say(line)
