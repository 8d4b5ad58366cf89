"""Forward passes over answers: which position predicts which token, in one place.

With p prompt tokens and n answer tokens, the hidden states at p-1 .. p+n-2 predict the answer and
are the states before each of its tokens; the one at p+n-1 is the state after the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from learner.heads import hidden_states, lm_head
from learner.optim import compute_in
from learner.rollout_batch import RolloutBatch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Microbatch:
    """b samples padded on the right to T tokens; their answers padded to `width`.

    rows: int64 [b] in the step's batch. input_ids, attention_mask: int64 [b, T].
    sources: int64 [N] flat positions in [b, T] that predict an answer token. labels: int64 [N].
    targets: int64 [N] flat positions of those tokens in [b, width]. ends: int64 [b], last token.
    """

    rows: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    sources: Tensor
    labels: Tensor
    targets: Tensor
    ends: Tensor
    width: int

    def spread(self, flat: Tensor) -> Tensor:
        """[N] numbers of answer tokens -> [b, width], zero elsewhere; keeps the gradient."""
        rows = len(self.rows)
        empty = torch.zeros(rows * self.width, dtype=flat.dtype, device=flat.device)
        return empty.index_copy(0, self.targets, flat).view(rows, self.width)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PolicyOutputs:
    """logp, entropy: float32 [b, width], zero at padding; entropy None where it was not asked for.
    hidden: [b, T, H], the trunk's output."""

    logp: Tensor
    entropy: Tensor | None
    hidden: Tensor


@dataclass(slots=True, kw_only=True, eq=False)
class Networks:
    """The models of a learner, on one device.

    reference: frozen, or None where nothing asks for a KL. value: a network of its own, or, with
    `shared`, a head on the policy's trunk; None for estimators without values.
    compute_dtype: "float32" or "bfloat16" (autocast; parameters stay float32).
    """

    policy: Any
    reference: Any | None
    value: nn.Module | None
    shared: bool
    compute_dtype: str
    device: torch.device

    @property
    def has_values(self) -> bool:
        return self.value is not None

    def values(self, micro: Microbatch, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(values of the states before each answer token [b, width], after the last one [b]).

        hidden: the policy's, used by a shared head only.
        """
        if self.value is None:
            raise ValueError("this learner has no value network")
        with compute_in(self.compute_dtype, self.device):
            if self.shared:
                every = self.value(hidden)
            else:
                every = self.value(micro.input_ids, micro.attention_mask)
        every = every.float()
        flat = every.reshape(-1)
        after = every.gather(1, micro.ends[:, None]).squeeze(1)
        return micro.spread(flat.index_select(0, micro.sources)), after


def make_microbatch(
    batch: RolloutBatch, rows: Sequence[int], device: torch.device | str
) -> Microbatch:
    """The rows `rows` of `batch`, padded. Padding ids are 0 and hidden by the attention mask."""
    prompts = [batch.prompt_ids.row(row) for row in rows]
    answers = [batch.response_ids.row(row) for row in rows]
    starts = np.array([len(ids) for ids in prompts], dtype=np.int64)
    counts = np.array([len(ids) for ids in answers], dtype=np.int64)
    lengths = starts + counts
    longest, width = int(lengths.max()), int(counts.max())
    real = np.arange(longest) < lengths[:, None]
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    pairs = zip(prompts, answers, strict=True)
    ids[real] = np.concatenate([part for pair in pairs for part in pair])
    at = np.concatenate([np.arange(count) for count in counts])
    line = np.repeat(np.arange(len(rows)), counts)
    arrays = {
        "rows": np.asarray(rows, dtype=np.int64),
        "input_ids": ids,
        "attention_mask": real.astype(np.int64),
        "sources": line * longest + np.repeat(starts, counts) - 1 + at,
        "labels": np.concatenate(answers).astype(np.int64),
        "targets": line * width + at,
        "ends": lengths - 1,
    }
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    return Microbatch(width=width, **tensors)


def policy_outputs(
    policy: Any,
    micro: Microbatch,
    temperature: float,
    compute_dtype: str,
    *,
    entropy: bool = False,
    entropy_gradient: bool = False,
) -> PolicyOutputs:
    """Log-probabilities and, if wanted, entropies of the answer tokens at `temperature`.

    The head runs at answer positions only, in float32.
    """
    with compute_in(compute_dtype, micro.input_ids.device):
        hidden = hidden_states(policy, micro.input_ids, micro.attention_mask)
    chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, micro.sources)
    logp, spread = lm_head(policy).logprobs(
        chosen, micro.labels, temperature, entropy=entropy, entropy_gradient=entropy_gradient
    )
    return PolicyOutputs(
        logp=micro.spread(logp),
        entropy=None if spread is None else micro.spread(spread),
        hidden=hidden,
    )
