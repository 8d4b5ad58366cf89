"""How many tokens the learner computes at once."""

from __future__ import annotations

from cluster.assembly.auto.choices import WIDTH, Choices
from cluster.assembly.model_facts import ModelFacts
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.devices import MICROBATCH_TOKENS
from cluster.machine.hardware import MB

SHARE = 3
"""What a forward pass keeps for its backward may take one of so many parts of the learner's share
of the GPU: weights, moments and gradients take about as much, logits and the reference the rest."""


def choose_microbatch(choices: Choices[TrainConfig], model: ModelFacts | None) -> None:
    """learner.tokens_per_microbatch"""
    learner = choices.config.learner
    tokens, least = MICROBATCH_TOKENS.on(learner.gpus > 0), MICROBATCH_TOKENS.cpu
    if not learner.gpus:
        why = "on a CPU products are as fast with more"
    elif model is None:
        tokens, why = least, "the model's config cannot be read"
    else:
        width = WIDTH[choices.config.model.dtype]
        each = model.layers * model.activation_bytes(width) / learner.tensor_parallel
        if learner.gradient_checkpointing:
            each = float(model.layers * model.hidden * width)
        room = choices.machine.gpu_memory_mb * MB * min(1.0, learner.gpus) / SHARE
        while tokens > least and tokens / learner.sequence_parallel * each > room:
            tokens //= 2
        kept = tokens / learner.sequence_parallel * each / MB
        why = f"a GPU computes many at once; a forward pass keeps {kept:.0f} MiB"
    choices.settle("learner.tokens_per_microbatch", tokens, why)
