"""Rollout groups <-> one Arrow table: how they travel from worker to learner and lie on disk.

A row is one sample. Lists of tokens, log-probabilities and versions stay Arrow lists, so no Python
object is made per token on the way.

policy is "" in a run with one policy. set_end, set_count and set_ids are the `TokenSets` of a
completion, empty lists where there are none. Tables of older runs do not have these columns.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import pyarrow as pa

from cluster.contracts.records import (
    Completion,
    Prompt,
    Rollout,
    RolloutGroup,
    Score,
    TokenSets,
    VersionSpan,
)

SCHEMA = pa.schema(
    [
        ("group_id", pa.int64()),
        ("sample", pa.int32()),
        ("policy", pa.string()),
        ("prompt_id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("span_version", pa.list_(pa.int64())),
        ("span_end", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("set_end", pa.list_(pa.int32())),
        ("set_count", pa.list_(pa.int32())),
        ("set_ids", pa.list_(pa.int32())),
        ("score", pa.float64()),
        ("score_parts", pa.string()),
        ("scorer_version", pa.string()),
        ("vetoes", pa.list_(pa.string())),
        ("text", pa.string()),
        ("messages", pa.string()),
        ("metadata", pa.string()),
    ],
    metadata={"accord.schema": "rollouts/1"},
)


def to_table(groups: Iterable[RolloutGroup]) -> pa.Table:
    """What belongs to a prompt is written out once and repeated by reference to its rows."""
    made = list(groups)
    pairs = [pair for group in made for pair in group.samples]
    prompts: dict[int, Prompt] = {id(rollout.prompt): rollout.prompt for rollout, _ in pairs}
    places = {key: place for place, key in enumerate(prompts)}
    of_row = pa.array([places[id(rollout.prompt)] for rollout, _ in pairs], pa.int32())
    columns = {
        "group_id": [group.group_id for group in made for _ in group.samples],
        **{name: one.take(of_row) for name, one in _prompt_columns(prompts.values()).items()},
        **_completion_columns([rollout.completion for rollout, _ in pairs]),
        **_score_columns([score for _, score in pairs]),
        "sample": [rollout.sample_index for rollout, _ in pairs],
        "text": [rollout.text for rollout, _ in pairs],
    }
    return pa.table({name: columns[name] for name in SCHEMA.names}, schema=SCHEMA)


def _prompt_columns(prompts: Iterable[Prompt]) -> dict[str, pa.Array]:
    """A row per prompt."""
    made = list(prompts)
    metadata = [json.dumps(dict(p.metadata), ensure_ascii=False, default=str) for p in made]
    messages = [json.dumps([dict(m) for m in p.messages], ensure_ascii=False) for p in made]
    return {
        "policy": pa.array([prompt.policy for prompt in made], pa.string()),
        "prompt_id": pa.array([prompt.id for prompt in made], pa.string()),
        "prompt_ids": pa.array([prompt.token_ids for prompt in made], pa.list_(pa.int32())),
        "messages": pa.array(messages, pa.string()),
        "metadata": pa.array(metadata, pa.string()),
    }


def _completion_columns(done: Sequence[Completion]) -> dict[str, Any]:
    return {
        "token_ids": _lists(pa.int32(), [c.token_ids for c in done]),
        "logprobs": _lists(pa.float32(), [c.logprobs for c in done]),
        "span_version": [[span.version for span in c.versions] for c in done],
        "span_end": [[span.end for span in c.versions] for c in done],
        "finish_reason": [c.finish_reason for c in done],
        **_set_columns([c.sampled_from for c in done]),
    }


def _set_columns(sets: Sequence[TokenSets | None]) -> dict[str, Any]:
    none = TokenSets(ends=(), counts=(), ids=())
    made = [none if one is None else one for one in sets]
    return {
        "set_end": _lists(pa.int32(), [one.ends for one in made]),
        "set_count": _lists(pa.int32(), [one.counts for one in made]),
        "set_ids": _lists(pa.int32(), [one.ids for one in made]),
    }


def _lists(kind: pa.DataType, rows: Sequence[Any]) -> pa.ListArray:
    """Arrays of 4-byte numbers joined as bytes, with the offset of each: no object per token."""
    offsets = array("i", accumulate(map(len, rows), initial=0))
    starts, values = (
        pa.Array.from_buffers(of, count, [None, pa.py_buffer(data)])
        for of, count, data in (
            (pa.int32(), len(offsets), offsets),
            (kind, offsets[-1], b"".join(rows)),
        )
    )
    return pa.ListArray.from_arrays(starts, values)


def _score_columns(scores: Sequence[Score]) -> dict[str, list[Any]]:
    return {
        "score": [score.value for score in scores],
        "score_parts": [json.dumps(dict(score.parts)) for score in scores],
        "scorer_version": [score.scorer_version for score in scores],
        "vetoes": [list(score.vetoes) for score in scores],
    }


def from_table(table: pa.Table) -> list[RolloutGroup]:
    """Records again, ordered by group and sample: for people and tests, not the learner's path."""
    by_group: dict[int, list[tuple[Rollout, Score]]] = {}
    for row in table.sort_by([("group_id", "ascending"), ("sample", "ascending")]).to_pylist():
        by_group.setdefault(row["group_id"], []).append(_sample(row))
    return [RolloutGroup(group_id=key, samples=tuple(rows)) for key, rows in by_group.items()]


def _sample(row: dict[str, Any]) -> tuple[Rollout, Score]:
    prompt = Prompt(
        id=row["prompt_id"],
        messages=tuple(json.loads(row["messages"])),
        token_ids=tuple(row["prompt_ids"]),
        metadata=json.loads(row["metadata"]),
        policy=row.get("policy") or "",
    )
    completion = Completion(
        token_ids=row["token_ids"],
        logprobs=row["logprobs"],
        versions=spans(row["span_version"], row["span_end"]),
        finish_reason=row["finish_reason"],
        sampled_from=_sets(row),
    )
    rollout = Rollout(
        prompt=prompt, completion=completion, sample_index=row["sample"], text=row["text"]
    )
    score = Score(
        value=row["score"],
        parts=json.loads(row["score_parts"]),
        scorer_version=row["scorer_version"],
        vetoes=tuple(row["vetoes"]),
    )
    return rollout, score


def _sets(row: dict[str, Any]) -> TokenSets | None:
    if not row.get("set_end"):
        return None
    return TokenSets(ends=row["set_end"], counts=row["set_count"], ids=row["set_ids"])


def spans(versions: Sequence[int], ends: Sequence[int]) -> tuple[VersionSpan, ...]:
    starts = [0, *ends[:-1]]
    return tuple(
        VersionSpan(version=version, start=start, end=end)
        for version, start, end in zip(versions, starts, ends, strict=True)
    )
