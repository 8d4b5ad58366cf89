"""Memory of each role of a training run, from the model's shapes and the probe's peak."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.contracts.config.train import TrainConfig
from cluster.contracts.registry import ADVANTAGE_ESTIMATORS

BYTES = {"float32": 4, "bfloat16": 2}
STATE = 16  # bytes a trained parameter in float32: weight, gradient, two moments


def memory_plan(config: TrainConfig, measured: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Bytes by what they are for. Activations are in none but the learner's measured peak.

    Weights held by one worker: those in force and those staged beside them. Copies of weights on
    their way: up to three versions (``docs/scale.md``): the one that workers hold or are being
    sent, the one a step starts from, and the one it publishes.
    """
    model = parameters(config)
    count, width = model["parameters"], BYTES[config.rollout.dtype]
    rollout, algorithm, learner = config.rollout, config.algorithm, config.learner
    plan = {"learner: policy, gradients, moments": STATE * count}
    if algorithm.kl.coef > 0 or learner.reference_path is not None:
        plan["learner: reference"] = 4 * count
    valued = ADVANTAGE_ESTIMATORS[algorithm.advantage].needs_values
    if valued and (learner.value_path or learner.value_model == "own"):
        plan["learner: value network"] = STATE * count
    plan["learner: peak of the probe's process"] = int(measured["learner"]["peak_rss_bytes"])
    longest = config.data.max_prompt_tokens + rollout.max_tokens
    plan |= {
        "worker: weights, in force and staged": 2 * width * count,
        "worker: key-value cache": rollout.kv_cache_mb << 20,
        "worker: cache for all seats at full length": (
            rollout.max_running * longest * model["cache_values_per_token"] * width
        ),
        "weights on their way (object store)": 3 * width * count,
    }
    if rollout.gpus >= 1:
        del plan["worker: key-value cache"]  # what the GPU's share leaves
    return plan


def parameters(config: TrainConfig) -> dict[str, int]:
    """Parameters of the policy, and key and value numbers a token takes in the cache."""
    import torch
    import transformers

    found = transformers.AutoConfig.from_pretrained(
        config.model.path,
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
    )
    with torch.device("meta"):
        policy = transformers.AutoModelForCausalLM.from_config(
            found, trust_remote_code=config.model.trust_remote_code
        )
    policy.tie_weights()
    text = found.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return {
        "parameters": sum(p.numel() for p in policy.parameters()),
        "cache_values_per_token": 2 * text.num_hidden_layers * heads * size,
    }
