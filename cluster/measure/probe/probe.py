"""A short probe of a training config here: each role by itself, then the step-time model.

One process after the other, each on the cores it would have, so that none disturbs another.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.assembly.core_record import KnownCosts, known_costs
from cluster.contracts.config.train import TrainConfig
from cluster.machine.cores import CorePlan, core_plan, own_cores
from cluster.machine.placement import LEARNER, WORKERS
from cluster.measure.bench import children
from cluster.measure.core_outlook import CoreOutlook, core_outlook, probed_costs
from cluster.measure.probe.engine import task_slots
from cluster.measure.step_time import (
    StepPrediction,
    StepTimes,
    learner_share,
    needed_bound,
    predict,
    workers_for,
)
from cluster.runs.console import Reporter

ROLES = {"engine": "generation", "reward": "scoring", "learner": "training"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What a run of the config should be like.

    bound: the smallest that costs nothing here. workers: the fewest that saturate the learner.
    synchronous_s: step time at bound 0. cores: who runs on which core. measured: what the probe
    found, role by role.
    """

    times: StepTimes
    prediction: StepPrediction
    synchronous_s: float
    samples_per_s: float
    tokens_per_s: float
    mean_length: float
    bound: int
    workers: int
    learner_share: float
    cores: CoreOutlook
    measured: dict[str, dict[str, Any]]


def probe(config: TrainConfig, reporter: Reporter) -> Outlook:
    """Takes 20 to 60 s for a small model. Raises UserError for what `accord train` would refuse,
    AccordError when a role fails."""
    everywhere = own_cores()
    cores = core_plan(config, everywhere)
    places = {"engine": cores.worker(0), "reward": cores.reward, "learner": cores.learner}
    threads = {"engine": cores.worker_threads, "learner": cores.learner_threads}
    measured: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="accord-probe-") as folder:
        for role, what in ROLES.items():
            task = {
                "role": role,
                "config": config.model_dump(mode="json"),
                "folder": folder,
                "cores": places[role],
                "threads": threads.get(role, 1),
            }
            with reporter.stage(f"probing {what}"):
                module = "cluster.measure.probe.child"
                measured[role] = children.run(module, task, f"the probe of {what}")
    known = known_costs(config, everywhere)
    return outlook(config, measured, cores, len(everywhere), known)


def outlook(
    config: TrainConfig,
    measured: Mapping[str, Mapping[str, Any]],
    cores: CorePlan,
    count: int,
    known: KnownCosts | None = None,
) -> Outlook:
    """The model's answer to what was measured. cores, count: of this machine. known: what an
    earlier run has measured."""
    engine, reward, learner = (measured[role] for role in ROLES)
    batch, workers = config.batch, config.rollout.workers
    samples = batch.prompts_per_step * batch.samples_per_prompt
    alone_s = samples * engine["mean_length"] / engine["tokens_per_s"]
    costs, source = probed_costs(config, measured, known)
    # What runs beside workers and learner on their cores takes its time from them.
    beside = core_outlook(config, cores, costs, source).beside()
    shared = not cores.workers and not config.cluster.to_join and not config.rollout.gpus
    busy_s = alone_s + learner["learn_s"] + reward["scoring_s"]
    times = StepTimes(
        generate_s=alone_s / workers,
        learn_s=learner["learn_s"],
        sample_s=engine["sample_s"],
        publish_s=learner["publish_s"] + engine["stall_s"],
        score_s=reward["score_s"],
        scoring_s=reward["scoring_s"],
        generation_stall_s=engine["stall_s"] + beside[WORKERS],
        learner_stall_s=beside[LEARNER],
        shared_s=busy_s / count if shared else 0.0,
        tail=max(1.0, engine["first_batch_s"] * engine["tokens_per_s"] / engine["first_tokens"]),
    )
    prediction = predict(times, config.staleness.bound)
    return Outlook(
        times=times,
        prediction=prediction,
        synchronous_s=predict(times, 0).step_s,
        samples_per_s=samples / prediction.step_s,
        tokens_per_s=samples * engine["mean_length"] / prediction.step_s,
        mean_length=engine["mean_length"],
        bound=needed_bound(workers * task_slots(config), samples),
        workers=workers_for(alone_s, learner["learn_s"] + times.learner_stall_s),
        learner_share=learner_share(alone_s, learner["learn_s"]),
        cores=core_outlook(config, cores, costs, source, prediction.step_s),
        measured={role: dict(found) for role, found in measured.items()},
    )
