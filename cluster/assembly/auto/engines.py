"""What an engine is given: the longest completion, seats, cache, its share of a GPU."""

from __future__ import annotations

import math
from typing import Any

from cluster.assembly.auto.choices import WIDTH, Choices, Load, counted
from cluster.assembly.auto.devices import choose_worker_cores
from cluster.assembly.auto.number_types import choose_engine_type
from cluster.assembly.model_facts import ModelFacts
from cluster.contracts.devices import COMPLETION_TOKENS, DECODED_AT_ONCE
from cluster.machine.hardware import MB

ENGINE_OVERHEAD_MB = 4096  # of a GPU: CUDA context, graphs, activations
CACHE_LEAST_MB = 64
GPU_LEAST = 0.05


def choose_engines(choices: Choices[Any], model: ModelFacts | None, load: Load) -> None:
    choose_engine_type(choices, model, load)
    choose_worker_cores(choices, model, load)
    choose_longest_completion(choices, model, load)
    choose_gpu_share(choices, model, load)
    choose_seats(choices, model, load)
    choose_cache(choices, model, load)


def choose_longest_completion(choices: Choices[Any], model: ModelFacts | None, load: Load) -> None:
    least = choices.config.rollout.min_tokens
    longest = COMPLETION_TOKENS.on(choices.config.rollout.gpus > 0)
    if model is None or model.context is None:
        why = f"the model's config names no context; at most {longest}"
        choices.settle("rollout.max_tokens", max(least, longest), why)
        return
    room, beside = model.context - load.prompt_tokens, f"prompts of {load.prompt_tokens}"
    if room < 1 or not load.prompt_tokens_set:
        room, beside = max(1, model.context // 2, room), "prompts"
    why = f"at most {longest}; the context of {model.context} leaves {room} beside {beside}"
    choices.settle("rollout.max_tokens", max(least, min(longest, room)), why)


def choose_gpu_share(choices: Choices[Any], model: ModelFacts | None, load: Load) -> None:
    rollout = choices.config.rollout
    if not rollout.gpus:
        choices.settle("rollout.gpu_memory_fraction", 0.45, "not used without a GPU")
        return
    learner = getattr(choices.config, "learner", None)
    # Shares that fit on one GPU together are put there by Ray.
    left = 1.0 - learner.gpus if learner is not None and learner.gpus < 1 else 1.0
    with_learner = left < 1 and rollout.gpus <= left
    on_one = math.floor((left if with_learner else 1.0) / rollout.gpus + 1e-3)
    together = max(1, min(on_one, load.engines))
    part = 0.45 if with_learner else 0.9
    why = f"{part} of the GPU, for {counted(together)}"
    why += " beside the learner" if with_learner else ""
    share = part / together
    if model is not None and not load.alone and choices.machine.gpu_memory_mb:
        # vLLM does not count the weights that are staged beside those in force.
        share -= _weights_mb(choices, model) / choices.machine.gpu_memory_mb
        why += ", less a second copy of the weights"
    share = max(GPU_LEAST, math.floor(1000 * share + 1e-6) / 1000)
    choices.settle("rollout.gpu_memory_fraction", share, why)


def choose_seats(choices: Choices[Any], model: ModelFacts | None, load: Load) -> None:
    """max_running: all that is outstanding, while the device and the cache can make use of it."""
    rollout = choices.config.rollout
    device = "GPU" if rollout.gpus else "CPU"
    limit = DECODED_AT_ONCE.on(rollout.gpus > 0)
    options = [(limit, f"a {device} decodes no faster with more than {limit}")]
    if load.outstanding is not None:
        own = math.ceil(load.outstanding / load.engines)
        options.append((own, f"no more than {own} completions are outstanding per worker"))
    if model is not None:
        budget, sequence = (
            _cache_budget_mb(choices, model, load),
            _sequence_mb(choices, model, load),
        )
        fit = max(1, int(budget / sequence) - 1)  # one seat is the canary's
        options.append((fit, f"its cache of {budget:.0f} MiB holds {fit} at full length"))
    choices.settle("rollout.max_running", *min(options, key=lambda option: option[0]))


def choose_cache(choices: Choices[Any], model: ModelFacts | None, load: Load) -> None:
    rollout = choices.config.rollout
    if rollout.gpus >= 1:
        why = "not used: what gpu_memory_fraction leaves"
        choices.settle("rollout.kv_cache_mb", CACHE_LEAST_MB, why)
    elif model is None:
        half = int(choices.machine.gpu_memory_mb * rollout.gpu_memory_fraction / 2)
        size = half if rollout.gpus else CACHE_LEAST_MB
        choices.settle("rollout.kv_cache_mb", size, "the model's config cannot be read")
    else:
        sequence = _sequence_mb(choices, model, load)
        full = math.ceil((rollout.max_running + 1) * sequence)
        budget = int(_cache_budget_mb(choices, model, load))
        size = max(CACHE_LEAST_MB, min(full, budget), math.ceil(2 * sequence))
        why = f"{rollout.max_running} completions at full length take {full} MiB"
        if size < full:
            what = (
                "the worker's share of the GPU leaves"
                if rollout.gpus
                else (f"a quarter of the memory, for {counted(load.engines)}, is")
            )
            why += f"; {what} {budget} MiB"
        choices.settle("rollout.kv_cache_mb", size, why)


def _cache_budget_mb(choices: Choices[Any], model: ModelFacts, load: Load) -> float:
    """MiB that one worker's cache may have."""
    rollout, machine = choices.config.rollout, choices.machine
    if "kv_cache_mb" in rollout.model_fields_set and rollout.gpus < 1:
        return float(rollout.kv_cache_mb)
    if not rollout.gpus:
        return machine.memory_mb / 4 / load.engines
    taken = _weights_mb(choices, model) + ENGINE_OVERHEAD_MB
    room = machine.gpu_memory_mb * rollout.gpu_memory_fraction - taken
    return max(0.0, room) * rollout.tensor_parallel


def _weights_mb(choices: Choices[Any], model: ModelFacts) -> float:
    """MiB of the weights on one GPU."""
    rollout = choices.config.rollout
    return model.parameters * WIDTH[rollout.dtype] / MB / rollout.tensor_parallel


def _sequence_mb(choices: Choices[Any], model: ModelFacts, load: Load) -> float:
    """MiB that the longest sequence takes in the cache, in whole blocks."""
    rollout = choices.config.rollout
    longest = load.prompt_tokens + rollout.max_tokens
    longest = min(longest, model.context or longest)
    blocks = math.ceil(longest / rollout.block_size)
    return blocks * rollout.block_size * model.cache_bytes(WIDTH[rollout.dtype]) / MB
