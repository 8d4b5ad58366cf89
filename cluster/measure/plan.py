"""`accord plan`: the resolved config, what follows from it, and, with a probe, how it will run."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from cluster.assembly.auto.choices import WIDTH, Resolved
from cluster.assembly.auto.resolve import resolve_here
from cluster.assembly.core_record import known_costs
from cluster.assembly.model_facts import ModelFacts, read_model_facts
from cluster.assembly.prepare import prepare
from cluster.contracts.config.file import dump_toml
from cluster.contracts.config.train import TrainConfig
from cluster.machine.cores import core_plan, own_cores
from cluster.machine.hardware import Machine, this_machine
from cluster.measure.core_outlook import CoreOutlook, core_lines, core_outlook
from cluster.measure.probe.memory import STATE, memory_plan
from cluster.measure.probe.probe import Outlook, probe
from cluster.runs.console import Reporter, result

MB = 1 << 20
QUIET = 0.9  # share of a core below which something else was running


def show_plan(
    config: TrainConfig, as_json: bool, with_probe: bool = False, reporter: Reporter | None = None
) -> None:
    """Print the plan. With the probe, models are loaded and run for some seconds.

    Raises UserError for what `accord train` would refuse before it starts anything.
    """
    resolved, record = checked_plan(config)
    config = resolved.config
    found = probe(config, reporter or Reporter()) if with_probe else None
    memory = memory_plan(config, found.measured) if found else {}
    cores = found.cores if found else cores_here(config)
    if as_json:
        shown = {**record, "cores": asdict(cores)}
        if found is not None:
            outlook = {**asdict(found), "memory": memory, "verdict": verdict(config, found)}
            shown["probe"] = outlook
        result(json.dumps(shown))
        return
    chosen = {key: f"auto: {reason.why}" for key, reason in resolved.reasons.items()}
    result(dump_toml(config, chosen))
    result("# derived")
    for name, value in record["derived"].items():
        result(f"#   {name} = {value}")
    for line in ("who runs on which core", *core_lines(cores)):
        result(f"# {line}".rstrip())
    if found is None:
        result("# step time, memory and bottleneck: add --probe (runs each role for some seconds)")
        return
    sizes = [f"  {name:<44} {size / MB:9.1f}" for name, size in memory.items()]
    for line in (*table(config, found), "memory, MiB", *sizes, "", verdict(config, found)):
        result(f"# {line}".rstrip())


def cores_here(config: TrainConfig) -> CoreOutlook:
    """Who runs on which core without a probe: with what an earlier run has measured, if one has."""
    cores = own_cores()
    known = known_costs(config, cores)
    source = known.source
    if known.costs is None:
        source = f"not known: {source}; --probe measures them"
    return core_outlook(config, core_plan(config, cores), known.costs, source, known.step_s)


def checked_plan(config: TrainConfig) -> tuple[Resolved[TrainConfig], dict[str, Any]]:
    """The config as it would be in force, and a record of it: ``config``, every value; ``auto``,
    what was chosen for this machine, and why; ``derived``, what follows from them.

    Raises UserError for what `accord train` would refuse before it starts anything.
    """
    resolved = resolve_here(config)
    prepare(resolved.config)
    return resolved, {
        "config": resolved.config.model_dump(mode="json"),
        "auto": {key: asdict(reason) for key, reason in resolved.reasons.items()},
        "derived": derived(resolved.config, read_model_facts(resolved.config.model)),
    }


def table(config: TrainConfig, found: Outlook) -> list[str]:
    """Seconds a step by role, as the probe measured them, and what the model makes of them."""
    times, engine = found.times, found.measured["engine"]
    rows = [
        ("generation", times.generate_s, f"{engine['tokens_per_s']:.0f} tokens/s a worker"),
        ("  one answer", times.sample_s, f"{found.mean_length:.1f} tokens on average"),
        ("  pause of a weight update", engine["stall_s"], ""),
        ("scoring", times.scoring_s, f"one call {1000 * times.score_s:.1f} ms"),
        ("learner", times.learn_s, f"weights ready in {1000 * times.publish_s:.1f} ms"),
        ("step at bound 0", found.synchronous_s, "synchronous"),
        (
            f"step at bound {config.staleness.bound}",
            found.prediction.step_s,
            f"{found.samples_per_s:.1f} samples/s, {found.tokens_per_s:.0f} tokens/s",
        ),
    ]
    rows += _evaluation_row(config, found)
    return [
        "predicted, seconds a step",
        *(f"  {name:<28} {seconds:8.3f}   {note}".rstrip() for name, seconds, note in rows),
        f"  busy: generation {found.prediction.generation_busy:.0%}, "
        f"learner {found.prediction.learner_busy:.0%}",
        f"  staleness bound needed: {found.bound} (set: {config.staleness.bound})",
        f"  workers that keep the learner busy: {found.workers} (set: {config.rollout.workers}); "
        f"the learner's share of the machine would be {found.learner_share:.0%}",
        *disturbed(config, found),
    ]


def _evaluation_row(config: TrainConfig, found: Outlook) -> list[tuple[str, float, str]]:
    """Seconds that the engines need for the completions of an evaluation, as they were measured."""
    evaluation = config.evaluation
    if not evaluation.every:
        return []
    tokens = evaluation.max_prompts * evaluation.samples * found.mean_length
    seconds = tokens / (found.measured["engine"]["tokens_per_s"] * config.rollout.workers)
    share = seconds / (evaluation.every * found.prediction.step_s)
    note = f"every {evaluation.every} steps: {share:.1%} of the engines' time"
    return [("an evaluation", seconds, note)]


def disturbed(config: TrainConfig, found: Outlook) -> list[str]:
    """A line where a role got less of a core than it asked for: then all times are too long."""
    on_gpu = {"engine": config.rollout.gpus, "learner": config.learner.gpus}  # these wait for it
    shares = [found.measured[role]["cpu_share"] for role in on_gpu if not on_gpu[role]]
    if not shares or min(shares) >= QUIET:
        return []
    return [f"  the machine was busy: a role got {min(shares):.0%} of a core; expect shorter steps"]


def verdict(config: TrainConfig, found: Outlook) -> str:
    """One sentence: what limits the run, and what would help."""
    prediction, workers = found.prediction, config.rollout.workers
    step = f"a step of about {prediction.step_s:.2g} s"
    if prediction.bottleneck == "generation":
        help_ = (
            f"rollout.workers={max(found.workers, workers + 1)} on cores of their own would help"
        )
        return (
            f"Bottleneck: generation ({step}; the learner works {prediction.learner_busy:.0%} of "
            f"it); {help_}."
        )
    if prediction.bottleneck == "learner":
        more = f" {found.workers} worker(s) would be enough;" if found.workers < workers else ""
        return (
            f"Bottleneck: the learner ({step}; generation works {prediction.generation_busy:.0%} "
            f"of it);{more} more cores or fewer passes for the learner would help."
        )
    if prediction.bottleneck == "scoring":
        return f"Bottleneck: the reward service ({step}); run a faster one (`accord serve-reward`)."
    if prediction.bottleneck == "cores":
        return f"Bottleneck: the cores of this machine, which all roles share ({step})."
    return (
        f"Bottleneck: the staleness bound of {config.staleness.bound} ({step}); "
        f"staleness.bound={found.bound} would let generation and training overlap."
    )


def derived(config: TrainConfig, model: ModelFacts | None) -> dict[str, Any]:
    """Numbers that follow from a resolved config. model: None where its config cannot be read."""
    batch, rollout, bound = config.batch, config.rollout, config.staleness.bound
    samples = batch.prompts_per_step * batch.samples_per_prompt
    cores = core_plan(config, own_cores())
    slots = rollout.workers * rollout.max_running
    return {
        "completions per step": samples,
        "completions of the whole run": samples * batch.steps,
        "completion tokens per step, at most": samples * rollout.max_tokens,
        "groups in flight, at most": (bound + 1) * batch.prompts_per_step,
        "completions decoded at once, at most": slots,
        # Little's law: S samples in flight, batches of B: so many steps of lag keep both busy.
        "staleness bound that keeps generation and training busy": -(-slots // samples) + 1,
        "optimiser steps per learner step": config.learner.epochs * config.learner.minibatches,
        **evaluation_share(config),
        "threads and cores": cores.describe(),
        "monitors that act": _acting(config),
        "asynchronous scheduling of vLLM": "off: a token that is under way at a swap would be "
        "recorded under the wrong version",
        **({} if model is None else sizes(config, model, this_machine())),
    }


def _acting(config: TrainConfig) -> str:
    acting = [f"{name} ({action})" for name, action in config.monitors.acting.items()]
    return ", ".join(acting) or "none, they only warn"


def evaluation_share(config: TrainConfig) -> dict[str, str]:
    """What evaluating the policy adds to what is sampled anyway; nothing where it is off."""
    evaluation, batch = config.evaluation, config.batch
    if not evaluation.every:
        return {}
    completions = evaluation.max_prompts * evaluation.samples
    trained = evaluation.every * batch.prompts_per_step * batch.samples_per_prompt
    times = batch.steps // evaluation.every + (batch.steps % evaluation.every > 0)
    cost = (
        f"{completions}, {completions / trained:.1%} of those for training; "
        f"{times + evaluation.start} evaluations"
    )
    if evaluation.keep_best:
        cost += ", each with a checkpoint"
    return {"completions per evaluation, at most": cost}


def sizes(config: TrainConfig, model: ModelFacts, machine: Machine) -> dict[str, str]:
    """Memory that the policy's weights take, from the model's shapes; a probe measures the rest."""
    rollout, learner = config.rollout, config.learner
    trained = STATE * model.parameters / (1 if learner.sharding == "none" else learner.processes)
    sampling = 2 * WIDTH[rollout.dtype] * model.parameters / rollout.tensor_parallel
    return {
        "parameters of the model, about": f"{model.parameters / 1e6:.1f} million",
        "a learner process: weights, gradients and moments, about": _beside(
            trained, machine, on_gpu=learner.gpus > 0
        ),
        "a worker: weights in force and staged, about": _beside(
            sampling, machine, on_gpu=rollout.gpus > 0
        ),
    }


def _beside(size: float, machine: Machine, *, on_gpu: bool) -> str:
    """Bytes, and what there is to hold them."""
    there, what = (
        (machine.gpu_memory_mb, "a GPU has")
        if on_gpu and machine.gpu_memory_mb
        else (machine.memory_mb, "this machine has")
    )
    short = ": NOT ENOUGH" if size / MB > there else ""
    return f"{size / MB:.0f} MiB ({what} {there} MiB{short})"
