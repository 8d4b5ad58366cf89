"""Forward passes over answers: which position predicts which token, in one place.

With p prompt tokens and n answer tokens, the hidden states at p-1 .. p+n-2 predict the answer and
are the states before each of its tokens; the one at p+n-1 is the state after the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from learner.algorithms.token_sets import TokenSets
from learner.compute.mesh import ALONE, Mesh
from learner.compute.microbatches import plan_microbatches
from learner.compute.optimizer import compute_in
from learner.compute.ranks import SINGLE, Ranks
from learner.compute.sharding import Gathered, call
from learner.models.heads import hidden_states, lm_head
from learner.models.packed_attention import Spans
from learner.rl.rollouts import RolloutBatch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Microbatch:
    """b samples, padded on the right to [b, T] or packed end to end as [1, T]; answers to `width`.

    rows: int64 [b] in the step's batch. input_ids: int64 [b or 1, T]. attention_mask: int64, as
    input_ids; all 1 in a pack. spans: where the samples of a pack lie, None in a padded one.
    sources: int64 [N] flat positions in input_ids that predict an answer token. labels: int64 [N].
    targets: int64 [N] flat positions of those tokens in [b, width]. ends: int64 [b], flat position
    of each sample's last token. sets: what each label was sampled from, None where every one was
    from the whole vocabulary. counts: False for one that is run only because another rank runs
    one meanwhile (see `Ranks.deal`): nothing may come of it.
    """

    rows: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    spans: Spans | None
    sources: Tensor
    labels: Tensor
    targets: Tensor
    ends: Tensor
    width: int
    sets: TokenSets | None = None
    counts: bool = True

    def spread(self, flat: Tensor) -> Tensor:
        """[N] numbers of answer tokens -> [b, width], zero elsewhere; keeps the gradient."""
        rows = len(self.rows)
        # Out of place, so that the gradient of `flat` comes through.
        empty = torch.zeros(rows * self.width, dtype=flat.dtype, device=flat.device)
        return empty.index_copy(0, self.targets, flat).view(rows, self.width)

    def cut(self, full: Tensor) -> Tensor:
        """The microbatch's [b, width] part of a step's [B, R] tensor."""
        return full.index_select(0, self.rows)[:, : self.width]

    def put(self, full: Tensor, part: Tensor) -> None:
        """Write [b, width] numbers into a step's [B, R] tensor, without gradient."""
        # A microbatch that only keeps another rank company belongs to that rank, which writes it:
        # ranks add these tensors up, so a second copy would double its numbers.
        if not self.counts:
            return
        full[self.rows, : self.width] = part.detach().to(full.dtype)


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

    reference: frozen, or None where nothing asks for a KL. value: a network of its own, or, with
    `shared`, a head on the policy's trunk; None for estimators without values.
    compute_dtype: "float32" or "bfloat16" (autocast; parameters stay float32).
    packed: the models take packed microbatches (see `learner.packing`). mesh: the processes that
    train them together. roots: of sharded models, what forward passes have to go through.
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
    def reference_root(self) -> Any:
        return self.roots.get("reference", self.reference)

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
                every = self.value(micro.input_ids, micro.attention_mask, micro.spans)
        # Float32 before anything is subtracted: a value's error in bfloat16 is larger than most
        # advantages. Flat, so that padded and packed rows are indexed alike.
        flat = every.float().reshape(-1)
        return micro.spread(flat.index_select(0, micro.sources)), flat.index_select(0, micro.ends)


class Microbatches:
    """How a step's rows are cut into microbatches: the one place that decides it.

    The cut is the same however many ranks there are; each then gets its share of the microbatches.
    Each set of rows is cut, and its tensors made, once; the passes before the update and every
    epoch over the same rows share them.
    """

    def __init__(
        self,
        batch: RolloutBatch,
        tokens_per_microbatch: int,
        device: torch.device | str,
        packed: bool = False,
        ranks: Ranks = SINGLE,
    ) -> None:
        self._batch, self._budget = batch, tokens_per_microbatch
        self._device, self._packed, self._ranks = device, packed, ranks
        self._made: dict[tuple[int, ...], list[Microbatch]] = {}

    def of(self, rows: Sequence[int]) -> list[Microbatch]:
        """This rank's microbatches of these rows, longest samples first."""
        # The order of rows is part of the key: it decides which row of a tensor is whose.
        key = tuple(rows)
        if key not in self._made:
            make: Callable[..., Microbatch] = make_pack if self._packed else make_microbatch
            lengths = self._batch.lengths[list(rows)].tolist()
            plan = plan_microbatches(lengths, self._budget, packed=self._packed)
            # Every rank makes the whole plan and takes its share of it: the cut, and with it the
            # result but for the order of sums, does not depend on how many there are.
            share = self._ranks.deal(plan, lambda chosen: sum(lengths[index] for index in chosen))
            made = [
                (make(self._batch, [rows[index] for index in chosen], self._device), counts)
                for chosen, counts in share
            ]
            self._made[key] = [m if counts else replace(m, counts=False) for m, counts in made]
        return self._made[key]


def make_microbatch(
    batch: RolloutBatch, rows: Sequence[int], device: torch.device | str
) -> Microbatch:
    """The rows `rows` of `batch`, padded. Padding ids are 0 and hidden by the attention mask."""
    prompts = [batch.prompt_ids.row(row) for row in rows]
    answers = [batch.response_ids.row(row) for row in rows]
    starts, counts = _lengths(prompts), _lengths(answers)
    lengths = starts + counts
    longest = int(lengths.max())
    real = np.arange(longest) < lengths[:, None]
    # Any id would do at padding: the attention mask hides it, and no loss looks there.
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    ids[real] = _joined(prompts, answers)
    begins = np.arange(len(rows)) * longest
    mask = real.astype(np.int64)
    padded = _microbatch(rows, answers, (ids, mask), begins, starts, counts, None, device)
    return replace(padded, sets=_token_sets(batch, rows, device))


def make_pack(batch: RolloutBatch, rows: Sequence[int], device: torch.device | str) -> Microbatch:
    """The rows `rows` of `batch` end to end in one row, without any padding."""
    prompts = [batch.prompt_ids.row(row) for row in rows]
    answers = [batch.response_ids.row(row) for row in rows]
    starts, counts = _lengths(prompts), _lengths(answers)
    ids = _joined(prompts, answers).astype(np.int64)[None]
    # Attention follows the spans: without them the samples of a pack would see each other.
    spans = Spans.of(starts + counts, device)
    begins = np.cumsum(starts + counts) - (starts + counts)
    mask = np.ones_like(ids)
    packed = _microbatch(rows, answers, (ids, mask), begins, starts, counts, spans, device)
    return replace(packed, sets=_token_sets(batch, rows, device))


def _token_sets(
    batch: RolloutBatch, rows: Sequence[int], device: torch.device | str
) -> TokenSets | None:
    """The sets of the answer tokens of `rows`, in the order of a microbatch's labels."""
    sampled = batch.sampled_from
    if sampled is None:
        return None
    bounds = batch.response_ids.offsets
    set_of = np.concatenate([sampled.set_of[bounds[row] : bounds[row + 1]] for row in rows])
    # Only sets that this microbatch uses travel to the device, numbered anew from 0.
    used, place = np.unique(set_of[set_of >= 0], return_inverse=True)
    if len(used) == 0:
        return None
    set_of[set_of >= 0] = place
    lengths = sampled.ids.lengths[used]
    arrays = {
        "set_of": set_of,
        "keeps": sampled.counts[used] > 0,
        "offsets": np.concatenate([[0], lengths.cumsum()]),
        "ids": np.concatenate([sampled.ids.row(one) for one in used]).astype(np.int64),
    }
    return TokenSets(**{name: torch.from_numpy(a).to(device) for name, a in arrays.items()})


def _microbatch(
    rows: Sequence[int],
    answers: Sequence[Any],
    ids_and_mask: tuple[Any, Any],
    begins: Any,
    starts: Any,
    counts: Any,
    spans: Spans | None,
    device: torch.device | str,
) -> Microbatch:
    """begins: flat position of each row's first token; starts, counts: prompt, answer tokens."""
    width = int(counts.max())
    at = np.concatenate([np.arange(count) for count in counts])
    arrays = {
        "rows": np.asarray(rows, dtype=np.int64),
        "input_ids": ids_and_mask[0],
        "attention_mask": ids_and_mask[1],
        # One less than the token's own position: hidden state t predicts token t + 1.
        "sources": np.repeat(begins + starts, counts) - 1 + at,
        "labels": np.concatenate(answers).astype(np.int64),
        "targets": np.repeat(np.arange(len(rows)) * width, counts) + at,
        "ends": begins + starts + counts - 1,
    }
    tensors: dict[str, Any] = {
        name: torch.from_numpy(array).to(device) for name, array in arrays.items()
    }
    return Microbatch(width=width, spans=spans, **tensors)


def _lengths(rows: Sequence[Any]) -> Any:
    return np.array([len(ids) for ids in rows], dtype=np.int64)


def _joined(prompts: Sequence[Any], answers: Sequence[Any]) -> Any:
    return np.concatenate([part for pair in zip(prompts, answers, strict=True) for part in pair])


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
        hidden = hidden_states(policy, micro.input_ids, micro.attention_mask, micro.spans)
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
