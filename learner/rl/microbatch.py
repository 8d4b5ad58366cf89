"""A step's rows as microbatches: which position predicts which token, in one place.

With p prompt tokens and n answer tokens, the hidden states at p-1 .. p+n-2 predict the answer and
are the states before each of its tokens; the one at p+n-1 is the state after the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from learner.algorithms.token_sets import TokenSets
from learner.compute.microbatches import plan_microbatches, position_ids
from learner.compute.ranks import SINGLE, Ranks
from learner.compute.ulysses import SequencePart
from learner.models.packed_attention import Spans
from learner.rl.own_rows import OwnRows
from learner.rl.rollouts import Array, RolloutBatch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Microbatch:
    """b samples, padded on the right to [b, T] or packed end to end as [1, T]; answers to `width`.

    rows: int64 [b] in this process's rows of the step. input_ids: int64 [b or 1, T].
    attention_mask: int64, as input_ids; all 1 in a pack. spans: where the samples of a pack lie,
    None in a padded one. sources: int64 [N] flat positions in input_ids that predict an answer
    token. labels: int64 [N]. targets: int64 [N] flat positions of those tokens in [b, width].
    ends: int64 [b], flat position of each sample's last token. sets: what each label was sampled
    from, None where every one was from the whole vocabulary. counts: False for one that is run
    only because another rank runs one meanwhile: nothing may come of it.
    part: the positions of this process, where rows are split over several. Then T, N and ends are
    those of its part, ended: int64, the samples that `ends` belong to; spans are of the whole pack.
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
    part: SequencePart | None = None
    ended: Tensor | None = None

    def spread(self, flat: Tensor) -> Tensor:
        """[N] numbers of answer tokens -> [b, width], zero elsewhere; keeps the gradient. With a
        `part`, those of all processes that share the rows."""
        rows = len(self.rows)
        # Out of place, so that the gradient of `flat` comes through.
        empty = torch.zeros(rows * self.width, dtype=flat.dtype, device=flat.device)
        return self._whole(empty.index_copy(0, self.targets, flat)).view(rows, self.width)

    def at_ends(self, flat: Tensor) -> Tensor:
        """[T * b] numbers of states -> [b], of the state after each sample's last token."""
        found = flat.index_select(0, self.ends)
        if self.ended is None:
            return found
        return self._whole(found.new_zeros(len(self.rows)).index_copy(0, self.ended, found))

    def _whole(self, numbers: Tensor) -> Tensor:
        return numbers if self.part is None else self.part.whole(numbers)

    def cut(self, full: Tensor) -> Tensor:
        """The microbatch's [b, width] part of a step's [B, R] tensor."""
        return full.index_select(0, self.rows)[:, : self.width]

    def reads_the_same(self, other: Microbatch) -> bool:
        """Whether a forward pass of the other one gives the same numbers under the same weights:
        all that it reads is the same, to the order of the samples."""
        pairs = [
            (getattr(self, name), getattr(other, name))
            for name in ("input_ids", "attention_mask", "sources", "labels", "targets", "ends")
        ]
        if (self.sets is None) != (other.sets is None):
            return False
        if self.sets is not None and other.sets is not None:
            names = [one.name for one in fields(TokenSets)]
            pairs += [(getattr(self.sets, name), getattr(other.sets, name)) for name in names]
        same_spans = (self.spans and self.spans.lengths) == (other.spans and other.spans.lengths)
        return (
            self.width == other.width
            and same_spans
            and all(torch.equal(one, another) for one, another in pairs)
        )

    def put(self, full: Tensor, part: Tensor) -> None:
        """Write [b, width] numbers into a step's [B, R] tensor, without gradient."""
        # One that only keeps another rank company was, or will be, written where it counts.
        if not self.counts:
            return
        full[self.rows, : self.width] = part.detach().to(full.dtype)


class Microbatches:
    """How this process's rows of a step are cut into microbatches: the one place that decides it.

    Each set of rows is cut, and its tensors made, once; the passes before the update and every
    epoch over the same rows share them.
    """

    def __init__(
        self,
        share: OwnRows,
        tokens_per_microbatch: int,
        device: torch.device | str,
        packed: bool = False,
        sequence: Ranks = SINGLE,
        part_of_row: Array | None = None,
    ) -> None:
        """part_of_row: int64 [B], the part of the step that each row belongs to; None: there is
        one. No microbatch of all rows holds rows of two parts."""
        self._part_of_row = part_of_row
        self._share, self._budget = share, tokens_per_microbatch
        self._device, self._packed, self._sequence = device, packed, sequence
        self._parts: dict[int, list[Microbatch]] | None = None
        self._made: dict[tuple[int, ...], list[Microbatch]] = {}

    def of(self, rows: Sequence[int]) -> list[Microbatch]:
        """This process's microbatches of these rows of the step, longest samples first; as many on
        every process, for with sharded weights each has to take part in every pass."""
        # The order of rows is part of the key: it decides which row of a tensor is whose.
        key = tuple(rows)
        if key not in self._made:
            if key == tuple(range(len(self._share.lengths))):
                self._made[key] = [micro for part in self.parts().values() for micro in part]
            else:
                self._made[key] = self._cut(np.asarray(rows, dtype=np.int64))
        return self._made[key]

    def parts(self) -> dict[int, list[Microbatch]]:
        """Those of all rows, by the part of the step that they belong to, in order."""
        if self._parts is None:
            of_row = self._part_of_row
            if of_row is None:
                of_row = np.zeros(len(self._share.lengths), dtype=np.int64)
            numbers = np.unique(of_row).tolist()
            self._parts = {part: self._cut(np.flatnonzero(of_row == part)) for part in numbers}
        return self._parts

    def _cut(self, rows: Array) -> list[Microbatch]:
        share = self._share
        plans = [self._plan(rows[share.owner[rows] == rank]) for rank in range(share.ranks.size)]
        own = plans[share.ranks.rank]
        made = [self._make(chosen) for chosen in own]
        missing = max(len(plan) for plan in plans) - len(own)
        if missing:
            # The cheapest keeps the others company; without one here, the shortest row of all.
            held = np.flatnonzero(share.owner == share.ranks.rank)
            shortest = held[share.lengths[held].argmin()]
            idle = made[-1] if made else self._make(np.array([shortest]))
            made += [replace(idle, counts=False)] * missing
        return made

    def _plan(self, rows: Array) -> list[Array]:
        lengths = self._share.lengths[rows].tolist()
        plan = plan_microbatches(lengths, self._budget, packed=self._packed)
        return [rows[chosen] for chosen in plan]

    def _make(self, rows: Array) -> Microbatch:
        make: Callable[..., Microbatch] = make_pack if self._packed else make_microbatch
        places = self._share.place[rows].tolist()
        return part_of(make(self._share.batch, places, self._device), self._sequence)


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


def part_of(whole: Microbatch, ranks: Ranks) -> Microbatch:
    """The positions of `whole` that this one of `ranks` computes; all of it where there is one.

    Rows are padded to a multiple of the ranks. A token belongs to the rank whose hidden state
    predicts it, which may lie before the cut that the token itself lies behind.
    """
    if ranks.size == 1:
        return whole
    length = whole.input_ids.shape[1]
    width = -(-length // ranks.size)
    missing, begin = width * ranks.size - length, ranks.rank * width

    def cut(tensor: Tensor) -> Tensor:
        return nn.functional.pad(tensor, (0, missing))[:, begin : begin + width].contiguous()

    def own(flat: Tensor) -> tuple[Tensor, Tensor]:
        """(which flat positions are this rank's, those in its part)"""
        row, column = flat // length, flat % length
        mine = column // width == ranks.rank
        return mine, (row * width + column - begin)[mine]

    spans = whole.spans
    if spans is not None and missing:
        # What pads a pack is a sample of its own, so that nobody attends to it.
        spans = Spans.of([*spans.lengths, missing], whole.input_ids.device)
    positions = position_ids(whole.attention_mask) if spans is None else spans.positions
    if positions.shape[1] == length:
        positions = nn.functional.pad(positions, (0, missing))
    mine, sources = own(whole.sources)
    at_end, ends = own(whole.ends)
    sets = whole.sets
    return replace(
        whole,
        input_ids=cut(whole.input_ids),
        attention_mask=cut(whole.attention_mask),
        spans=spans,
        sources=sources,
        labels=whole.labels[mine],
        targets=whole.targets[mine],
        ends=ends,
        ended=at_end.nonzero().flatten(),
        sets=None if sets is None else replace(sets, set_of=sets.set_of[mine]),
        part=SequencePart(ranks, positions[:, begin : begin + width].contiguous()),
    )
