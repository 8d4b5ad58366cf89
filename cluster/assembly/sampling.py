"""Sampling answers with rollout workers, outside a training run."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from actors.settings import AdapterSettings, engine_settings
from cluster.assembly.adapted import AdaptedModel, adapted
from cluster.assembly.auto.resolve import resolve_sampling
from cluster.assembly.local_workers import LocalWorker
from cluster.assembly.model_facts import read_model_facts
from cluster.assembly.prepare import context_length, prompt_room
from cluster.contracts.chat import is_text
from cluster.contracts.config.base import ModelConfig
from cluster.contracts.config.rollout import DataConfig, RolloutConfig
from cluster.contracts.records import Prompt, Rollout
from cluster.machine.cores import own_cores
from cluster.machine.event_loop import run_coroutine
from cluster.machine.hardware import Machine, this_machine
from cluster.machine.ray_session import in_ray_cluster
from cluster.machine.shipment import Shipment, known_as

if TYPE_CHECKING:
    from actors.serving import WorkerSpec

START_S = 2.5  # CPU seconds, of a worker that is forked
# What a token takes at most of a core: a good estimate of two measured sizes, 0.9 and 19 M. Twice
# as much or as little moves the choice where one worker more saves a second or two.
TOKEN_S = 6e-5
TOKEN_FLOPS = 4e10

ADAPTER = "adapter"
"""The only one of an engine that samples from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """One policy, and the prompts it answers. files: what its workers are sent."""

    model: ModelConfig
    prompts: Sequence[Prompt]
    samples: int
    rollout: RolloutConfig
    max_prompt_tokens: int
    seed: int = 0
    timeout_s: float = 3600.0
    files: Shipment = field(default_factory=Shipment)


def prompts_for(
    model: ModelConfig,
    data: DataConfig,
    seed: int,
    most: int | None = None,
    max_tokens: int | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Prompt]:
    """Prompts of a file in file order, tokenised for ``model``, the first ``most`` of them.
    ``max_tokens``: of an answer, for which the context must have room, too. ``say``: is told what
    was left out."""
    from actors.prompts import load_prompts
    from learner.models.files import check_causal_model
    from learner.models.load import load_tokenizer

    model = adapted(model)
    check_causal_model(model.path, model.revision, model.trust_remote_code)
    room = None if max_tokens is None else prompt_room(model, max_tokens)
    in_order = data.model_copy(update={"shuffle": False})
    source = load_prompts(in_order, load_tokenizer(model), seed, room)
    if say is not None:
        for line in source.left_out_lines():
            say(line)
    return [source.prompt(i) for i in range(min(len(source), most or len(source)))]


def sample_jobs(jobs: Sequence[Sampling]) -> list[list[Rollout]]:
    """Answers of each job, in the order of its prompts; within `sampling_cluster`. Jobs run side by
    side, each with its own workers, as many as there are cores for and as pay for their start."""
    return run_coroutine(_sample_all(jobs))


async def _sample_all(jobs: Sequence[Sampling]) -> list[list[Rollout]]:
    cores = own_cores()
    each = max(1, len(cores) // len(jobs))
    shares = [cores[i * each : (i + 1) * each] or cores for i in range(len(jobs))]
    counts = [
        min(job.rollout.workers, len(own), _worth_starting(job))
        for job, own in zip(jobs, shares, strict=True)
    ]
    machine = this_machine()
    ready = [
        _resolved(job, machine, count, sum(counts)) for job, count in zip(jobs, counts, strict=True)
    ]
    return list(
        await asyncio.gather(*(_sample(*one) for one in zip(ready, shares, counts, strict=True)))
    )


def _resolved(job: Sampling, machine: Machine, workers: int, engines: int) -> Sampling:
    """With every value that was left at auto. engines: of all jobs, which share the machine."""
    rollout = resolve_sampling(
        job.rollout,
        machine,
        read_model_facts(adapted(job.model)),
        engines=engines,
        prompt_tokens=job.max_prompt_tokens,
        # A job's own completions; engines of other jobs have as many.
        outstanding=math.ceil(len(job.prompts) * job.samples / workers) * engines,
    )
    return dataclasses.replace(job, rollout=rollout)


def cores_of_worker(index: int, rollout: RolloutConfig, cores: Sequence[int]) -> tuple[int, ...]:
    """``rollout.cpus`` cores of its own; workers for which none are left share all of them."""
    if rollout.gpus:
        return ()
    each = max(1, int(rollout.cpus))
    return tuple(cores[index * each : (index + 1) * each]) or tuple(cores)


async def _sample(job: Sampling, cores: list[int], count: int) -> list[Rollout]:
    from actors.sampling import generate_all
    from actors.serving import WorkerSpec
    from learner.models.load import load_tokenizer, stop_token_ids

    model, prompts = adapted(job.model), job.prompts
    stop_ids = stop_token_ids(model.path, load_tokenizer(model), model.revision)
    engine = replace(
        engine_settings(model, job.rollout, stop_ids, job.max_prompt_tokens, context_length(model)),
        record_token_sets=False,  # only a learner asks what a token was sampled from
    )
    if isinstance(model, AdaptedModel):
        fixed = (ADAPTER, known_as(model.adapter), model.rank)
        engine = replace(engine, adapters=AdapterSettings(fixed=(fixed,)))
        prompts = [replace(prompt, policy=ADAPTER) for prompt in prompts]
    spec = WorkerSpec(
        engine=engine,
        kind=job.rollout.engine,
        seed=job.seed,
        transport=None,
        start_timeout_s=job.rollout.start_timeout_s,
        files=job.files,
    )
    workers = _workers(job, spec, cores, max(1, count))
    try:
        await asyncio.gather(*(worker.start() for worker in workers))
        return await generate_all(workers, prompts, job.samples, job.timeout_s)
    finally:
        await asyncio.gather(*(worker.stop() for worker in workers), return_exceptions=True)


def _workers(job: Sampling, spec: WorkerSpec, cores: list[int], count: int) -> Sequence[Any]:
    """On Ray where it runs, else in processes of this machine."""
    if not in_ray_cluster():
        return [
            LocalWorker(spec, index, cores_of_worker(index, job.rollout, cores))
            for index in range(count)
        ]
    from actors.remote import make_worker_factory

    make = make_worker_factory(
        spec,
        num_cpus=job.rollout.cpus,
        num_gpus=job.rollout.gpus,
        cores=lambda index: cores_of_worker(index, job.rollout, cores),
        resources=job.rollout.resources,
        labels=job.rollout.labels,
    )
    return [make(index, 0) for index in range(count)]


def _worth_starting(job: Sampling) -> int:
    """Most workers on CPUs: each is to have more to do than its start costs."""
    if job.rollout.gpus or "max_tokens" not in job.rollout.model_fields_set:
        return job.rollout.workers
    facts = read_model_facts(adapted(job.model))
    if facts is None:
        return job.rollout.workers
    tokens = len(job.prompts) * job.samples * job.rollout.max_tokens
    seconds = tokens * (TOKEN_S + 2 * facts.parameters / TOKEN_FLOPS)
    return max(1, int(seconds / START_S))


def answer_row(rollout: Rollout) -> dict[str, Any]:
    """An answer in the prompt+completion shape that ``accord sft`` reads, and, as prompts, every
    command that samples."""
    text = is_text(rollout.prompt.messages)
    prompt = [dict(m) for m in rollout.prompt.messages]
    return {
        "prompt": prompt[0]["content"] if text else prompt,
        "completion": rollout.text if text else [{"role": "assistant", "content": rollout.text}],
        "sample": rollout.sample_index,
        "finish_reason": rollout.completion.finish_reason,
        "tokens": len(rollout.completion.token_ids),
        "metadata": dict(rollout.prompt.metadata),
    }
