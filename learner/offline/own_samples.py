"""What is measured on completions that the trained policy itself writes.

Preference pairs cannot tell how far the policy has moved: the KL to the reference is an expectation
over the policy's own completions.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch

from cluster.contracts.config.base import ModelConfig
from cluster.contracts.config.offline import FitConfig
from learner.compute.mesh import ALONE, Mesh
from learner.compute.microbatches import TokenRow, token_row
from learner.compute.sharding import Gathered, call
from learner.models.load import stop_token_ids
from learner.offline.completion_logps import all_completion_logps

_PROMPTS_AT_ONCE = 64


def measure_own_samples(
    policy: Any,
    reference: AbstractContextManager[Any],
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    start: ModelConfig,
    fit: FitConfig,
    *,
    seed: int,
    device: torch.device,
    mesh: Mesh = ALONE,
) -> dict[str, float]:
    """eval/kl: nats per completion, mean of log pi - log ref over one completion per prompt, with
    its standard error eval/kl_error; eval/length: tokens per completion, end token included.

    Completions are sampled at temperature 1 and end at `fit.max_tokens`, prompt included. start:
    where both come from; it says what is computed in and which tokens end a completion.
    """
    ends = stop_token_ids(start.path, tokenizer, start.revision)
    longest = fit.max_tokens
    usable = [ids for ids in prompts if len(ids) < longest]
    if not usable:
        return {}
    rows = []
    # The first process's completions count. Sharded weights need the others in every token, too.
    writes = mesh.first or isinstance(policy, Gathered)
    for first in range(0, len(usable) if writes else 0, _PROMPTS_AT_ONCE):
        part = usable[first : first + _PROMPTS_AT_ONCE]
        rows += sample(policy, part, longest, ends, seed, device)
    rows = mesh.everyone.from_first(rows)
    measured = (start.dtype, device, fit.tokens_per_microbatch, mesh)
    ours = all_completion_logps(policy, rows, *measured)
    with reference as other:  # None: the policy, changed within
        theirs = all_completion_logps(policy if other is None else other, rows, *measured)
    ratios = [a - b for a, b in zip(ours, theirs, strict=True)]
    error = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else 0.0
    return {
        "eval/kl": statistics.fmean(ratios),
        "eval/kl_error": error,
        "eval/length": statistics.fmean(row.trained for row in rows),
    }


@torch.no_grad()
def sample(
    policy: Any,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    ends: Sequence[int],
    seed: int,
    device: torch.device,
) -> list[TokenRow]:
    """One completion per prompt at temperature 1, up to `max_tokens` tokens of both together.

    Torch's random state is as before afterwards. Prompts are padded on the left, as
    `transformers.generate` wants them. policy: may be `Gathered`; every rank then has to ask.
    """
    width = max(len(ids) for ids in prompts)
    batch = torch.full((len(prompts), width), ends[0], dtype=torch.int64)
    mask = torch.zeros_like(batch)
    for place, ids in enumerate(prompts):
        batch[place, width - len(ids) :] = torch.tensor(ids)
        mask[place, width - len(ids) :] = 1
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        generate = partial(
            _generate, input_ids=batch.to(device), attention_mask=mask.to(device), do_sample=True,
            temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_tokens - min(map(len, prompts)),
            eos_token_id=list(ends), pad_token_id=ends[0],
            # Ranks that end at different tokens still have to take part in each other's.
            synced_gpus=isinstance(policy, Gathered),
        )  # fmt: skip
        written = call(policy, generate)[:, width:].tolist()
    rows = []
    for ids, tokens in zip(prompts, written, strict=True):
        end = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
        completion = tokens[: min(end, max_tokens - len(ids))]
        mask_row = [False] * len(ids) + [True] * len(completion)
        rows.append(token_row([*ids, *completion], mask_row))
    return rows


def _generate(policy: Any, **options: Any) -> Any:
    return policy.generate(**options)
