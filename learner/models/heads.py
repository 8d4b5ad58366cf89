"""What is computed from a trunk's hidden states: logits, log-probabilities, values, rewards.

The trunk is run without its head, so that a head over a large vocabulary is paid for at trained
positions only. B rows, T tokens, H hidden size, V vocabulary, N selected positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cluster.contracts.devices import KEPT_PROBABILITIES, LOGITS_AT_ONCE
from cluster.contracts.errors import UserError
from learner.algorithms.logprobs import (
    VocabularyPart,
    chunked_linear_logprobs,
    entropy_from_logits,
    logprobs_from_logits,
)
from learner.algorithms.masked import last_valid_index
from learner.algorithms.token_sets import TokenSets
from learner.compute.microbatches import PaddedRows, position_ids
from learner.compute.ranks import Ranks, is_sharded
from learner.compute.sharding import local
from learner.compute.ulysses import SequencePart
from learner.models.packed_attention import Spans, run_trunk


def hidden_states(
    policy: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    spans: Spans | None = None,
    part: SequencePart | None = None,
) -> Tensor:
    """[B, T, H] last hidden states of the decoder trunk (final norm included), without the head.

    Works on a causal model and on a sequence-classification model. Both inputs [B, T], padding on
    the right; positions are counted over real tokens. spans: of a pack [1, T] instead. part: the
    ids are this process's part of rows, and so are the states; `spans` are of the whole pack.
    """
    return trunk_states(policy.base_model, input_ids, attention_mask, spans, part)


def trunk_states(
    trunk: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    spans: Spans | None = None,
    part: SequencePart | None = None,
) -> Tensor:
    """`hidden_states` of a bare trunk."""
    if spans is not None or part is not None:
        return run_trunk(trunk, input_ids, spans, part)
    result = trunk(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids(attention_mask),
        use_cache=False,
    )
    hidden: Tensor = result.last_hidden_state
    return hidden


@dataclass(frozen=True, slots=True)
class LmHead:
    """logits = softcap * tanh(z / softcap) with z = scale * (hidden @ weight.T + bias).

    weight: [V, H], bias: [V] or None, both still attached to the model; DTensors where processes
    have a part of the vocabulary each. scale is 1 but for Cohere
    (`logit_scale`) and Granite (1 / `logits_scaling`); softcap is None but for Gemma 2 and 3 with
    `final_logit_softcapping`.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V], as the model itself computes them, in float32 at least. Without a
        gradient where processes have a part of the vocabulary each."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        bias = None if self.bias is None else local(self.bias).to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            z = nn.functional.linear(hidden.to(dtype), local(self.weight).to(dtype), bias)
            z = z * self.scale
            if self.softcap is not None:
                return self.softcap * (z / self.softcap).tanh()
            ranks = self._ranks()
            return z if ranks is None else ranks.joined(z.detach())

    def _ranks(self) -> Ranks | None:
        """The processes that have a part of the vocabulary each."""
        return Ranks.along(self.weight, "tensor") if is_sharded(self.weight) else None

    def logprobs(
        self,
        hidden: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        *,
        entropy: bool = False,
        entropy_gradient: bool = False,
        reduced: bool = False,
        sets: TokenSets | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """([N] log-probabilities of `labels` at `temperature`, [N] entropies or None).

        hidden: [N, H]; labels: [N] int64. Entropies carry a gradient only with `entropy_gradient`.
        reduced: see `chunked_linear_logprobs`; a capped head ignores it.
        sets: what each label was sampled from, where that is not the whole vocabulary.
        """
        if self.softcap is None:
            rows, vocabulary = hidden.shape[0], self.weight.shape[0]
            weight, ranks = local(self.weight), self._ranks()
            part = None
            if ranks is not None:
                begin = ranks.rank * weight.shape[0]
                part = VocabularyPart(start=begin, add=ranks.add_, largest=ranks.largest_)
            logp, spread = chunked_linear_logprobs(
                hidden,
                weight,
                labels,
                temperature / self.scale,
                None if self.bias is None else local(self.bias),
                max(1, LOGITS_AT_ONCE.on(hidden.device) // vocabulary),
                entropy_gradient,
                entropy=entropy,
                keep=rows * vocabulary <= KEPT_PROBABILITIES.on(hidden.device),
                reduced=reduced,
                sets=sets,
                part=part,
            )
            return logp, spread if entropy else None
        logits = self.logits(hidden)
        if sets is not None:
            forbidden = sets.forbidden(slice(None), logits.shape[-1])
            logits = logits.masked_fill(forbidden, -torch.inf)
        logp = logprobs_from_logits(logits, labels, temperature)
        if not entropy:
            return logp, None
        source = logits if entropy_gradient else logits.detach()
        return logp, entropy_from_logits(source, temperature)


def lm_head(policy: Any) -> LmHead:
    """The policy's output head with what its architecture does to the logits.

    `check_lm_head` proves that it is complete. Raises UserError where there is no linear head.
    """
    output = policy.get_output_embeddings()
    if output is None or getattr(output, "weight", None) is None:
        raise UserError(
            f"{type(policy).__name__} has no linear output head",
            where=str(policy.config.name_or_path),
            fix="use a causal language model, for example Llama, Qwen, Gemma or Mistral",
        )
    config = policy.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    bias = getattr(output, "bias", None)
    return LmHead(output.weight, bias, scale, None if softcap is None else float(softcap))


@torch.no_grad()
def check_lm_head(policy: Any) -> None:
    """Raise UserError unless trunk + `lm_head` give the model's own logits on a few tokens.

    An architecture that scales or caps its logits in a way unknown here would train on wrong
    log-probabilities without any other sign.
    """
    head = lm_head(policy)
    ids = torch.arange(1, 5, device=head.weight.device)[None] % head.weight.shape[0]
    mask = torch.ones_like(ids)
    own = policy(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    ours = head.logits(hidden_states(policy, ids, mask))
    # The model rounds its logits to its own type, and ours are float32.
    close = 1e-3 if head.weight.dtype == torch.float32 else 3e-2
    if own.shape != ours.shape or not torch.allclose(own, ours, rtol=close, atol=close):
        raise UserError(
            f"{type(policy).__name__} computes its logits in a way Accord does not know",
            where=str(policy.config.name_or_path),
            fix="use another architecture (Llama, Qwen2, Qwen3, Gemma and Mistral are tested)",
        )


def token_logprobs(
    policy: Any,
    rows: PaddedRows,
    temperature: float = 1.0,
    *,
    entropy: bool = False,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(log-probabilities [B, T], entropies [B, T] or None, hidden states [B, T, H]) of a forward.

    Column t holds the number of token t itself (predicted from t - 1) where rows.loss_mask is set,
    and 0 elsewhere. The head runs at those positions only.
    """
    hidden = hidden_states(policy, rows.input_ids, rows.attention_mask)
    wanted = rows.loss_mask[:, 1:]
    logp, spread = lm_head(policy).logprobs(
        hidden[:, :-1][wanted],
        rows.input_ids[:, 1:][wanted],
        temperature,
        entropy=entropy,
        entropy_gradient=entropy_gradient,
    )
    scattered = None if spread is None else _scatter(spread, rows.loss_mask)
    return _scatter(logp, rows.loss_mask), scattered, hidden


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def reward_scores(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """[B] float32 raw scores: the `score` heads' mean at each row's last real token.

    With one head equal to the model's own forward on right-padded rows that do not contain its
    padding id.
    """
    return member_scores(model, input_ids, attention_mask).mean(dim=-1)


def member_scores(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """[B, K] float32 raw scores of the K `score` heads on one trunk."""
    return scores_of_states(model, hidden_states(model, input_ids, attention_mask), attention_mask)


def scores_of_states(model: Any, hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """`member_scores` of hidden states [B, T, H]: the heads at each row's last real token."""
    last = last_valid_index(attention_mask)
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        scores: Tensor = model.score(hidden[rows, last].float())
    return scores


class SharedValueHead(nn.Module):
    """A linear value on the policy's own hidden states: [..., H] -> [...] float32, 0 at first."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = zero_linear(hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            value: Tensor = self.linear(hidden.float())
        return value.squeeze(-1)


def zero_linear(hidden_size: int) -> nn.Linear:
    """Linear H -> 1 with weight and bias 0: the first values are 0, not noise."""
    linear = nn.Linear(hidden_size, 1)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
