"""Arrow tables of rollouts -> the arrays of one learner step, without an object per token.

Rows are ordered by (group, sample), so that a step never depends on which worker was faster.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.contracts.errors import Fatal

Array = np.ndarray[Any, np.dtype[Any]]

_PAIRS_AT_ONCE = 1 << 22  # of a token and an id of its set: bounds the memory of a check


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """Rows of different lengths: row i is values[offsets[i] : offsets[i + 1]]."""

    values: Array
    offsets: Array

    @property
    def lengths(self) -> Array:
        return np.diff(self.offsets)

    def row(self, index: int) -> Array:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def take(self, rows: Array) -> Ragged:
        """These rows, in this order."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], lengths.cumsum()])
        return Ragged(self.values[self.positions(rows)], offsets)

    def positions(self, rows: Array) -> Array:
        """int64: where the numbers of these rows are among `values`, row after row."""
        lengths = self.lengths[rows]
        starts = lengths.cumsum() - lengths
        found: Array = np.repeat(self.offsets[rows] - starts, lengths) + np.arange(lengths.sum())
        return found

    def padded(self, width: int, fill: float = 0) -> Array:
        """[rows, width], filled on the right with `fill`."""
        out = np.full((len(self.offsets) - 1, width), fill, dtype=self.values.dtype)
        out[np.arange(width) < self.lengths[:, None]] = self.values
        return out


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampledFrom:
    """The part of the vocabulary each token was sampled from (`records.TokenSets` of all rows).

    set_of: int64, as the tokens of `response_ids`, index of a token's set; -1: the whole
    vocabulary. counts: int64 [S], positive where a set lists what could be sampled, negative where
    it lists what could not. ids: int32 ragged, of each set.
    """

    set_of: Array
    counts: Array
    ids: Ragged


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RolloutBatch:
    """One step's samples, B rows ordered by (group, sample).

    group_ids: int64 [B]. prompt_ids, response_ids: int32 ragged. behaviour_logp: float32 ragged,
    the engine's, at the sampling temperature. versions: int64 ragged, the policy version each
    token was sampled from. sampled_from: None where each token was sampled from the whole
    vocabulary. truncated: bool [B], the answer was cut at the token limit.
    scores: float64 [B]. parts: unweighted score by scorer, float64 [B]. table: the rows themselves.
    """

    group_ids: Array
    prompt_ids: Ragged
    response_ids: Ragged
    behaviour_logp: Ragged
    versions: Ragged
    sampled_from: SampledFrom | None
    truncated: Array
    scores: Array
    parts: dict[str, Array]
    table: pa.Table

    def __len__(self) -> int:
        return len(self.group_ids)

    def take(self, rows: Array) -> RolloutBatch:
        """Some rows, int64, in this order, as a batch. Sets of tokens are shared."""
        sampled = self.sampled_from
        if sampled is not None:
            set_of = sampled.set_of[self.response_ids.positions(rows)]
            sampled = replace(sampled, set_of=set_of)
        return RolloutBatch(
            group_ids=self.group_ids[rows],
            prompt_ids=self.prompt_ids.take(rows),
            response_ids=self.response_ids.take(rows),
            behaviour_logp=self.behaviour_logp.take(rows),
            versions=self.versions.take(rows),
            sampled_from=sampled,
            truncated=self.truncated[rows],
            scores=self.scores[rows],
            parts={name: part[rows] for name, part in self.parts.items()},
            table=self.table.take(pa.array(rows)),
        )

    @property
    def lengths(self) -> Array:
        """int64 [B]: prompt and response tokens of each row."""
        return self.prompt_ids.lengths + self.response_ids.lengths


def as_table(payload: Any) -> pa.Table:
    """An Arrow table, or the bytes of an Arrow stream. Raises Fatal for anything else."""
    if isinstance(payload, pa.Table):
        return payload
    if isinstance(payload, bytes | bytearray | memoryview | pa.Buffer):
        return pa.ipc.open_stream(pa.py_buffer(payload)).read_all()
    raise Fatal(f"a payload is neither an Arrow table nor Arrow bytes: {type(payload).__name__}")


def read_batch(
    payloads: Sequence[pa.Table], group_ids: Sequence[int], samples_per_prompt: int
) -> RolloutBatch:
    """Select and order the rows of `group_ids` from all payloads (`rollout_table.SCHEMA`).

    Raises Fatal for a group or sample that is missing or there twice, and for a row that breaks
    the schema's promises (nulls, counts that differ, numbers that are not finite).
    """
    table = _select(payloads, group_ids)
    _check_ids(table, group_ids, samples_per_prompt)
    response = _ragged(table, "token_ids")
    batch = RolloutBatch(
        group_ids=table.column("group_id").to_numpy().copy(),
        prompt_ids=_ragged(table, "prompt_ids"),
        response_ids=response,
        behaviour_logp=_ragged(table, "logprobs"),
        versions=_token_versions(table, response),
        sampled_from=_sampled_from(table, response),
        truncated=np.asarray(pc.equal(table.column("finish_reason"), "length")).astype(bool),
        scores=table.column("score").to_numpy(),
        parts=_parts(table),
        table=table,
    )
    _check_rows(batch)
    return batch


def _select(payloads: Sequence[pa.Table], group_ids: Sequence[int]) -> pa.Table:
    # A payload is what a worker had finished when it was asked, so it may hold groups of other
    # steps beside those of this one.
    wanted = pa.array(sorted(set(group_ids)), type=pa.int64())
    if len(wanted) != len(group_ids):
        raise Fatal(f"a step asks for a group twice: {sorted(group_ids)}")
    if not payloads:
        raise Fatal("a step came without any payload")
    chosen = [p.filter(pc.is_in(p.column("group_id"), value_set=wanted)) for p in payloads]
    # By id and not by arrival: the same groups give the same step, whoever was faster.
    order = [("group_id", "ascending"), ("sample", "ascending")]
    return pa.concat_tables(chosen).sort_by(order).combine_chunks()


def _check_ids(table: pa.Table, group_ids: Sequence[int], samples: int) -> None:
    groups = table.column("group_id").to_numpy()
    missing = sorted(set(group_ids) - set(groups.tolist()))
    if missing:
        raise Fatal(f"groups {missing[:8]} of this step are in none of its payloads")
    # One comparison of whole columns; which groups are wrong is looked for only if it fails.
    expected = np.repeat(np.sort(np.asarray(group_ids, dtype=np.int64)), samples)
    found = table.column("sample").to_numpy()
    right = len(groups) == len(expected) and bool(
        (groups == expected).all() and (found == np.tile(np.arange(samples), len(group_ids))).all()
    )
    if not right:
        wrong = _wrong_groups(groups, found, samples)
        raise Fatal(f"groups {wrong[:8]} do not hold samples 0..{samples - 1} exactly once")


def _wrong_groups(groups: Array, found: Array, samples: int) -> list[int]:
    return [
        int(group)
        for group in np.unique(groups)
        if found[groups == group].tolist() != list(range(samples))
    ]


def _ragged(table: pa.Table, name: str) -> Ragged:
    column = table.column(name)
    # A table of one chunk, made by combine_chunks, gives the list buffers without a copy.
    lists = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    # Nulls would silently become zeros in the arrays below.
    if lists.null_count or lists.flatten().null_count:
        raise Fatal(f"the rollouts hold nulls in {name!r}")
    offsets = lists.offsets.to_numpy().astype(np.int64)
    # Offsets of a slice begin where it does in the parent's buffer, not at 0.
    return Ragged(lists.flatten().to_numpy(), offsets - offsets[0])


def _token_versions(table: pa.Table, response: Ragged) -> Ragged:
    """Run-length coded versions -> one version a token."""
    version, end = _ragged(table, "span_version"), _ragged(table, "span_end")
    covered = np.zeros(len(response.offsets) - 1, dtype=np.int64)
    filled = end.lengths > 0
    covered[filled] = end.values[end.offsets[1:][filled] - 1]
    counts = _run_lengths(end)
    if (
        not np.array_equal(version.offsets, end.offsets)
        or not np.array_equal(covered, response.lengths)
        or bool((counts <= 0).any())
    ):
        raise Fatal("version spans do not cover each token of the rollouts exactly once")
    return Ragged(np.repeat(version.values, counts), response.offsets)


def _sampled_from(table: pa.Table, response: Ragged) -> SampledFrom | None:
    """Run-length coded sets -> one index per token. Raises Fatal where they do not fit the tokens.

    None where there are no sets.
    """
    if "set_end" not in table.column_names:  # written before there were any
        return None
    end, count, ids = (_ragged(table, name) for name in ("set_end", "set_count", "set_ids"))
    if len(end.values) == 0:
        return None
    counts = count.values.astype(np.int64)
    sizes = np.abs(counts)
    runs = _run_lengths(end)
    row_of_run = np.repeat(np.arange(len(end.lengths)), end.lengths)
    tokens = np.bincount(row_of_run, runs, len(end.lengths)).astype(np.int64)
    some = end.lengths > 0
    if (
        not np.array_equal(end.offsets, count.offsets)
        or not np.array_equal(np.bincount(row_of_run, sizes, len(some)), ids.lengths)
        or not np.array_equal(tokens[some], response.lengths[some])
        or bool((runs <= 0).any())
    ):
        raise Fatal("the sets that tokens were sampled from do not cover each token exactly once")
    set_of = np.full(len(response.values), -1, dtype=np.int64)
    covered = np.repeat(some, response.lengths)
    set_of[covered] = np.repeat(np.where(counts == 0, -1, np.arange(len(counts))), runs)
    offsets = np.concatenate([[0], sizes.cumsum()])
    found = SampledFrom(set_of=set_of, counts=counts, ids=Ragged(ids.values, offsets))
    _check_membership(found, response)
    return found


def _run_lengths(ends: Ragged) -> Array:
    """Ends of runs that begin at 0 in each row -> int64 length of each run."""
    found = np.diff(ends.values.astype(np.int64), prepend=0)
    first = ends.offsets[:-1][ends.lengths > 0]
    found[first] = ends.values[first]
    return found


def _check_membership(sampled: SampledFrom, response: Ragged) -> None:
    """Raise Fatal for a token that could not have been sampled: its probability would be 0."""
    limited = sampled.set_of >= 0
    sets, tokens = sampled.set_of[limited], response.values[limited]
    largest = int(sampled.ids.lengths.max(initial=1))
    at_once = max(1, _PAIRS_AT_ONCE // largest)
    for start in range(0, len(sets), at_once):
        some, wanted = sets[start : start + at_once], tokens[start : start + at_once]
        listed = _listed(sampled.ids, some, wanted)
        wrong = np.flatnonzero(listed != (sampled.counts[some] > 0))
        if len(wrong):
            raise Fatal(
                f"token {wanted[wrong[0]]} of a rollout is not among those it is said to have been "
                "sampled from"
            )


def _listed(ids: Ragged, sets: Array, tokens: Array) -> Array:
    """bool: whether set `sets[i]`, which is not empty, lists `tokens[i]`."""
    lengths = ids.lengths[sets]
    starts = lengths.cumsum() - lengths
    # A pair for each token and each id of its set.
    place = np.repeat(ids.offsets[sets] - starts, lengths) + np.arange(lengths.sum())
    same = ids.values[place] == np.repeat(tokens, lengths)
    found: Array = np.logical_or.reduceat(same, starts)
    return found


def _parts(table: pa.Table) -> dict[str, Array]:
    # What a row lacks is NaN, which the metrics leave out.
    rows = [json.loads(text) for text in table.column("score_parts").to_pylist()]
    names = sorted({name for row in rows for name in row})
    return {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}


def _check_rows(batch: RolloutBatch) -> None:
    if not np.array_equal(batch.behaviour_logp.offsets, batch.response_ids.offsets):
        raise Fatal("rollouts have another number of log-probabilities than of tokens")
    if bool((batch.response_ids.lengths == 0).any() or (batch.prompt_ids.lengths == 0).any()):
        raise Fatal("a rollout has an empty prompt or an empty answer")
    # One number that is not finite makes every weight of the policy so after the update.
    if not (np.isfinite(batch.behaviour_logp.values).all() and np.isfinite(batch.scores).all()):
        raise Fatal("a rollout has a log-probability or a score that is not finite")
