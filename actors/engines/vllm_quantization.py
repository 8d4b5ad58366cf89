"""Engines that hold and multiply their matrices in 8 bits: what vLLM is told, and how an update
becomes what such an engine stores.

The learner publishes the weights as they are. The engine rounds them as they arrive, so that every
transport and every merge of adapters is the same with and without 8 bits:

    matrix of a linear layer ──▶ 8-bit numbers + one scale a row (output channel)
    all else (embeddings, norms, biases, the head) stays in the engine's own number type

int8 runs in vLLM's CPU build (oneDNN) and on GPUs; fp8 (e4m3) has no kernel on a CPU and has not
been run.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from actors.engines.eight_bits import Named, as_stored, matrices, quantization_config
from actors.engines.host_tensors import model_without_memory
from actors.settings import EngineSettings
from cluster.contracts.errors import UserError

_KEY = "accord_quantization"  # of vLLM's `additional_config`, which its workers see


def quantization_args(settings: EngineSettings) -> dict[str, Any]:
    """Engine arguments of an engine in 8 bits; none without.

    Raises UserError where vLLM has no kernel for it, or the weights would come from the disk.
    """
    kind = settings.quantization
    if kind == "none":
        return {}
    _refuse(settings)
    model = model_without_memory(settings)
    output = model.get_output_embeddings()
    head = next(name for name, module in model.named_modules() if module is output)
    return {
        "hf_overrides": {"quantization_config": quantization_config(kind, head)},
        "additional_config": {_KEY: (kind, tuple(sorted(matrices(model, head))))},
    }


def _refuse(settings: EngineSettings) -> None:
    where = "rollout.quantization"
    if settings.quantization == "fp8" and current_platform.is_cpu():
        raise UserError(
            "vLLM has no kernel for fp8 activations on a CPU",
            where=where,
            fix="set rollout.quantization = 'int8', or 'none'",
        )
    if settings.weights == "disk":
        raise UserError(
            "an engine in 8 bits takes its weights from a learner, and here there is none",
            where=where,
            fix="leave rollout.quantization out: it is for training",
        )
    if settings.adapters is not None:
        raise UserError(
            "an engine that serves several adapters cannot hold its matrices in 8 bits",
            where=where,
            fix="leave rollout.quantization out, or train one policy",
        )


def stored(config: VllmConfig, tensors: Named) -> Named:
    """The tensors of an update as the engine of this configuration stores them."""
    kind, rounded = config.additional_config.get(_KEY, ("none", ()))
    return tensors if kind == "none" else as_stored(tensors, kind, frozenset(rounded))
