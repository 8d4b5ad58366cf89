"""Bytes of a learner process and of an engine by what they are for, from the shapes of the models.

Nothing is loaded and no GPU is needed. The figures of the learner are compared with measured peaks
by `benchmarks/sharded_memory.py` (docs/scale.md has the table).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.assembly.auto.choices import WIDTH
from cluster.assembly.model_facts import ModelFacts
from cluster.contracts.config.compute import ComputeConfig
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.registry import ADVANTAGE_ESTIMATORS

MB = 1 << 20
PROCESS = {"cuda": 1536 * MB, "cpu": 660 * MB}
"""What a process holds before a model: libraries, and CUDA's context and NCCL's buffers (of these
nothing was measured)."""
_CHUNK = {"cuda": 1 << 27, "cpu": 1 << 23}  # logits at once: learner/models/heads.py
_KEPT = {"cuda": 1 << 29, "cpu": 1 << 25}  # probabilities kept, likewise
_QUANTISED = {"8bit": 1.0, "4bit": 0.53}  # bytes a number, with scales


SENDING = "weights being sent"
TRAINING = frozenset(
    {
        *("gradients", "activations kept", "activations of one layer", "logits"),
        *("layers gathered", "embeddings and head gathered", "weights rounded for a pass"),
    }
)
"""What there is only while a step trains, and what only while its weights are sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Bytes by purpose of one process: on its device, and in the memory of its host."""

    device: Mapping[str, float]
    host: Mapping[str, float]

    @property
    def total(self) -> float:
        """At most at once: weights are sent when the gradients have been freed."""
        sending = self.device.get(SENDING, 0.0)
        training = sum(size for name, size in self.device.items() if name in TRAINING)
        rest = sum(self.device.values()) - sending - training
        return rest + max(sending, training)


def learner_sizes(config: TrainConfig, model: ModelFacts, tokens: int | None = None) -> Sizes:
    """Of one process of the learner, on a GPU or, with `learner.gpus` 0, on a CPU.

    The reference and a value network of its own are taken to have the policy's shape. tokens: of
    the largest microbatch; None: `tokens_per_microbatch`.
    """
    learner, dtype = config.learner, WIDTH[config.model.dtype]
    parts = learner.processes if learner.sharding == "fsdp2" else learner.tensor_parallel
    tokens = learner.tokens_per_microbatch if tokens is None else tokens
    weights, trained = _weights(config, model, dtype)
    own_value = _has_own_value(config)
    networks = 2 if own_value else 1
    moments = (2 if learner.optimizer == "adamw8bit" else 8) * trained / parts
    held = {
        "weights": weights / parts,
        "gradients": 4 * trained / (1 if _keeps_gradients(learner) else parts),
        "moments of the optimiser": moments,
        "reference": _reference(config, model, dtype) / parts,
        "value network of its own": own_value * (weights / parts + 4 * trained / parts + moments),
        **_passing(config, model, dtype, tokens, networks),
    }
    on_host = dict.fromkeys(held, 0.0)
    for kind, names in _OFFLOADED.items():
        if kind in learner.offload:
            for name in names:
                on_host[name], held[name] = held[name], 0.0
    device = {name: size for name, size in held.items() if size}
    return Sizes(
        device=device | {"libraries": float(PROCESS[_kind(learner.gpus)])},
        host={name: size for name, size in on_host.items() if size},
    )


_OFFLOADED = {
    "optimizer": ("moments of the optimiser",),
    "parameters": (
        *("weights", "gradients", "moments of the optimiser", "reference"),
        "value network of its own",
    ),
    "reference": ("reference",),
    "activations": ("activations kept",),
}


def _weights(config: TrainConfig, model: ModelFacts, dtype: int) -> tuple[float, int]:
    """(bytes of a whole policy's weights, numbers of it that are trained)."""
    if config.lora is None:
        return 4.0 * model.parameters, model.parameters
    adapters = model.adapter_parameters(config.lora.rank) * max(1, len(config.policies))
    base = _QUANTISED.get(config.lora.base, dtype) * model.layers * model.layer_parameters
    return base + dtype * model.outer_parameters + 4 * adapters, adapters


def _reference(config: TrainConfig, model: ModelFacts, dtype: int) -> float:
    named = config.learner.reference_path is not None
    wanted = config.algorithm.kl.coef > 0 or named
    # Under LoRA it is the policy's own base, with the adapters off.
    return float(dtype * model.parameters) if wanted and (named or config.lora is None) else 0.0


def _has_own_value(config: TrainConfig) -> bool:
    learner = config.learner
    needed = ADVANTAGE_ESTIMATORS[config.algorithm.advantage].needs_values
    return needed and (learner.value_path is not None or learner.value_model == "own")


def _keeps_gradients(learner: ComputeConfig) -> bool:
    return learner.sharding == "fsdp2" and learner.gradient_reduction == "step"


def _passing(
    config: TrainConfig, model: ModelFacts, dtype: int, tokens: int, networks: int
) -> dict[str, float]:
    """What a forward and backward pass needs for a while."""
    learner, width = config.learner, WIDTH[config.rollout.dtype]
    split = learner.tensor_parallel
    tokens = -(-tokens // learner.sequence_parallel)
    layer, outer = model.layer_parameters / split, model.outer_parameters / split
    stream = tokens * model.hidden * dtype
    inside = float(tokens * model.activation_bytes(dtype) / split)
    again = learner.gradient_checkpointing
    passing = {
        "activations kept": float(networks * model.layers * (stream if again else inside)),
        "activations of one layer": inside if again else 0.0,
        "logits": _logits(model, tokens / 2, dtype, _kind(learner.gpus)),
        SENDING: _sending(config, model, width),
    }
    if learner.sharding == "fsdp2":
        layers = 1 + learner.prefetch_layers if learner.reshard_after_forward else model.layers
        # A gradient as it is computed, and in float32 as it is dealt out; none of a frozen base.
        gradient = dtype + 4 if config.lora is None else 0
        passing["layers gathered"] = dtype * layers * layer + gradient * layer
        passing["embeddings and head gathered"] = (dtype + gradient) * outer
    elif config.model.dtype == "bfloat16" and config.lora is None:
        every = 0 if learner.gradient_checkpointing else model.layers
        passing["weights rounded for a pass"] = dtype * (every or 1) * layer
    return passing


def _sending(config: TrainConfig, model: ModelFacts, width: int) -> float:
    """Two buckets, and the largest tensor, which is gathered whole. Of LoRA: the adapters."""
    if config.lora is not None:
        return 8.0 * model.adapter_parameters(config.lora.rank)
    buckets = 2.0 * min(config.weights.bucket_mb * MB, width * model.parameters)
    return buckets + width * model.vocabulary * model.hidden


def _logits(model: ModelFacts, rows: float, dtype: int, kind: str) -> float:
    """Rows: completion tokens, the only ones whose logits are computed."""
    every = rows * model.vocabulary
    return 3 * 4 * min(every, _CHUNK[kind]) + (dtype * every if every <= _KEPT[kind] else 0)


def _kind(gpus: float) -> str:
    return "cuda" if gpus else "cpu"


def engine_sizes(config: TrainConfig, model: ModelFacts, gpu_bytes: float) -> Sizes:
    """Of one GPU of a worker. New weights are staged beside those in force; the cache gets
    `rollout.kv_cache_mb` on a GPU that is shared, else what is left of
    `rollout.gpu_memory_fraction`."""
    rollout = config.rollout
    weights = WIDTH[rollout.dtype] * model.parameters / rollout.tensor_parallel
    fixed = {
        "weights in force": weights,
        "weights staged": weights,
        "buckets being received": 2.0 * config.weights.bucket_mb * MB,
        "CUDA context, graphs, activations": 4096.0 * MB,
    }
    if rollout.gpus < 1:
        cache = {"key-value cache": float(rollout.kv_cache_mb * MB)}
    else:
        left = gpu_bytes * rollout.gpu_memory_fraction - sum(fixed.values())
        cache = {"key-value cache (what is left)": max(0.0, left)}
    return Sizes(device=fixed | cache, host={})
