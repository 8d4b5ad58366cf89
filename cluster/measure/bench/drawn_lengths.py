"""A model whose completions have lengths from a given distribution, sampled by any engine.

A model with random weights ends a completion with the same probability at every token, so its
lengths are geometric. Real completions are closer to lognormal. This model counts down: after a
prompt it samples "n tokens are left" with the wanted probabilities, then n - 1, n - 2, ..., and at
last the end token. Its transformer blocks compute as any others do but write nothing, so that the
next token depends on the one before alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

CERTAIN = 40.0  # logit of the next number of a countdown; the others are near 0
LIFTED = 20.0  # logits after a prompt: numbers are so far above tokens that are none
RAREST = 1e-9  # probabilities below count as this, so that logarithms are finite


def lognormal_lengths(mean: float, variation: float, longest: int) -> list[float]:
    """Probability of each length 2, 3, ..., ``longest`` tokens. ``variation``: the coefficient of
    variation before the cut. What would be longer has the length ``longest``."""
    variance = math.log(1 + variation**2)
    middle, width = math.log(mean) - variance / 2, math.sqrt(variance)

    def below(length: float) -> float:
        return 0.5 * (1 + math.erf((math.log(length) - middle) / (width * math.sqrt(2))))

    ends = [0.0, *(below(length + 0.5) for length in range(2, longest)), 1.0]
    return [high - low for low, high in pairwise(ends)]


def count_down(
    directory: Path, probabilities: Sequence[float], prompt_end: str, first: int = 500
) -> None:
    """Rewrite the model in ``directory`` so that a completion has i + 2 tokens, the end token
    among them, with probability ``probabilities[i]``.

    prompt_end: what every prompt ends with, one token. first: the id of the token that stands for
    "one more token"; the ids after it for the others. Raises ValueError where ``prompt_end`` is
    more than a token, or one of these.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from learner.models.files import quiet_transformers
    from learner.models.load import save_policy

    tokenizer = AutoTokenizer.from_pretrained(directory)
    numbers = list(range(first, first + len(probabilities)))
    start = tokenizer(prompt_end, add_special_tokens=False)["input_ids"]
    if len(start) != 1 or start[0] in numbers:
        raise ValueError(f"{prompt_end!r} is not one token beside the numbers: {start}")
    config = AutoConfig.from_pretrained(directory, tie_word_embeddings=False)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        with quiet_transformers():  # it misses the head that is set below
            model = AutoModelForCausalLM.from_pretrained(directory, config=config)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        _set_tokens(model, numbers, probabilities, start[0], tokenizer.eos_token_id)
    save_policy(model, tokenizer, directory)


def _set_tokens(
    model: Any, numbers: list[int], probabilities: Sequence[float], start: int, end: int
) -> None:
    """Embeddings are directions of length sqrt(hidden), which the last norm leaves as they are."""
    import torch

    hidden = model.config.hidden_size
    after_prompt, *left = torch.nn.functional.normalize(torch.randn(len(numbers) + 1, hidden))
    states = torch.stack(left)
    # At right angles to the state after a prompt: a countdown must not disturb the draw.
    states = states - (states @ after_prompt)[:, None] * after_prompt
    states = torch.nn.functional.normalize(states)
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    embeddings[numbers] = math.sqrt(hidden) * states
    embeddings[start] = math.sqrt(hidden) * after_prompt
    logits = torch.tensor([LIFTED + math.log(max(p, RAREST)) for p in probabilities])
    head.zero_()
    head[numbers] = logits[:, None] * after_prompt / math.sqrt(hidden)
    followers = [end, *numbers[:-1]]
    head[followers] += CERTAIN * states / math.sqrt(hidden)
