"""Forward passes of the policy and the value network over a microbatch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from learner.compute.mesh import ALONE, Mesh
from learner.compute.optimizer import compute_in
from learner.compute.ranks import Ranks
from learner.compute.sharding import Gathered, call
from learner.models.heads import hidden_states, lm_head
from learner.models.lora import DEFAULT, is_factor, one_adapter, without_adapters
from learner.rl.microbatch import Microbatch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PolicyOutputs:
    """logp, entropy: float32 [b, width], zero at padding; entropy None where it was not asked for.
    hidden: the trunk's output, [*input_ids.shape, H]."""

    logp: Tensor
    entropy: Tensor | None
    hidden: Tensor


@dataclass(slots=True, kw_only=True, eq=False)
class Networks:
    """The models of a learner, on one device.

    reference: frozen, or None where nothing asks for a KL. Under LoRA it may be the policy itself,
    which `as_reference` then runs without its adapters. value: a network of its own, or, with
    `shared`, a head on the policy's trunk; None for estimators without values.
    compute_dtype: "float32" or "bfloat16" (autocast; parameters stay float32).
    packed: the models take packed microbatches (see `learner.packing`). mesh: the processes that
    train them together. roots: of sharded models, what forward passes have to go through.
    adapter: which of the policy's LoRA adapters is trained here, where it has any.
    """

    policy: Any
    reference: Any | None
    value: nn.Module | None
    shared: bool
    compute_dtype: str
    device: torch.device
    packed: bool = False
    mesh: Mesh = ALONE
    roots: dict[str, Gathered] = field(default_factory=dict)
    adapter: str = DEFAULT

    def policy_parameters(self) -> list[nn.Parameter]:
        """Of the policy, without the adapters of other policies."""
        named = self.policy.named_parameters()
        return [p for name, p in named if not is_factor(name) or is_factor(name, self.adapter)]

    def own_adapter(self) -> AbstractContextManager[None]:
        """The policy computes with `adapter` alone, meanwhile."""
        return one_adapter(self.policy, self.adapter)

    @property
    def ranks(self) -> Ranks:
        """All processes that train them."""
        return self.mesh.everyone

    @property
    def has_values(self) -> bool:
        return self.value is not None

    @property
    def sharded(self) -> bool:
        """Each rank holds a part of the weights, and has to take part in every pass."""
        return bool(self.roots)

    @property
    def policy_root(self) -> Any:
        """What `policy_outputs` takes."""
        return self.roots.get("policy", self.policy)

    @property
    def reference_is_base(self) -> bool:
        """Whether the reference is the policy's own base."""
        return self.reference is self.policy

    @contextmanager
    def as_reference(self) -> Iterator[Any]:
        """What `policy_outputs` takes for the reference's numbers, meanwhile."""
        if self.reference_is_base:
            with without_adapters(self.policy):
                yield self.policy_root
        else:
            yield self.roots.get("reference", self.reference)

    def values(self, micro: Microbatch, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(values of the states before each answer token [b, width], after the last one [b]).

        hidden: the policy's, used by a shared head only.
        """
        if self.value is None:
            raise ValueError("this learner has no value network")
        with compute_in(self.compute_dtype, self.device):
            # A shared head reads the hidden states that the policy's own pass has made already.
            if self.shared:
                every = self.value(hidden)
            else:
                every = self.value(micro.input_ids, micro.attention_mask, micro.spans, micro.part)
        # Float32 before anything is subtracted: a value's error in bfloat16 is larger than most
        # advantages. Flat, so that padded and packed rows are indexed alike.
        flat = every.float().reshape(-1)
        return micro.spread(flat.index_select(0, micro.sources)), micro.at_ends(flat)


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

    The head runs at answer positions only; its logits are float32.
    policy: a causal model, or the root of a sharded one.
    """
    logp, spread, hidden = call(
        policy, _outputs, micro, temperature, compute_dtype, entropy, entropy_gradient
    )
    return PolicyOutputs(logp=logp, entropy=spread, hidden=hidden)


def _outputs(
    policy: Any,
    micro: Microbatch,
    temperature: float,
    compute_dtype: str,
    entropy: bool,
    entropy_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    # The head is outside: it casts by itself, and its logits have to be float32 to agree with
    # the engine's log-probabilities.
    with compute_in(compute_dtype, micro.input_ids.device):
        hidden = hidden_states(
            policy, micro.input_ids, micro.attention_mask, micro.spans, micro.part
        )
    # Prompt and padding positions are dropped before the head: with a vocabulary of 150,000 the
    # head costs as much as many layers, and its logits more memory than the rest of the pass.
    chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, micro.sources)
    logp, spread = lm_head(policy).logprobs(
        chosen,
        micro.labels,
        temperature,
        entropy=entropy,
        entropy_gradient=entropy_gradient,
        reduced=compute_dtype == "bfloat16",
        sets=micro.sets,
    )
    return micro.spread(logp), None if spread is None else micro.spread(spread), hidden
