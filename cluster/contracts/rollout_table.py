"""Rollout groups <-> one Arrow table: how they travel from worker to learner and lie on disk.

A row is one sample. Lists of tokens, log-probabilities and versions stay Arrow lists, so no Python
object is made per token on the way.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from cluster.contracts.records import (
    Completion,
    Prompt,
    Rollout,
    RolloutGroup,
    Score,
    VersionSpan,
)

SCHEMA = pa.schema(
    [
        ("group_id", pa.int64()),
        ("sample", pa.int32()),
        ("prompt_id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("span_version", pa.list_(pa.int64())),
        ("span_end", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
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
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for group in groups:
        for rollout, score in group.samples:
            _append(columns, group.group_id, rollout, score)
    return pa.table(columns, schema=SCHEMA)


def _append(columns: dict[str, list[Any]], group_id: int, rollout: Rollout, score: Score) -> None:
    prompt, done = rollout.prompt, rollout.completion
    row = {
        "group_id": group_id,
        "sample": rollout.sample_index,
        "prompt_id": prompt.id,
        "prompt_ids": prompt.token_ids,
        "token_ids": done.token_ids,
        "logprobs": done.logprobs,
        "span_version": [span.version for span in done.versions],
        "span_end": [span.end for span in done.versions],
        "finish_reason": done.finish_reason,
        "score": score.value,
        "score_parts": json.dumps(dict(score.parts)),
        "scorer_version": score.scorer_version,
        "vetoes": list(score.vetoes),
        "text": rollout.text,
        "messages": json.dumps([dict(m) for m in prompt.messages], ensure_ascii=False),
        "metadata": json.dumps(dict(prompt.metadata), ensure_ascii=False, default=str),
    }
    for name, value in row.items():
        columns[name].append(value)


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
    )
    completion = Completion(
        token_ids=tuple(row["token_ids"]),
        logprobs=tuple(row["logprobs"]),
        versions=spans(row["span_version"], row["span_end"]),
        finish_reason=row["finish_reason"],
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


def spans(versions: Sequence[int], ends: Sequence[int]) -> tuple[VersionSpan, ...]:
    starts = [0, *ends[:-1]]
    return tuple(
        VersionSpan(version=version, start=start, end=end)
        for version, start, end in zip(versions, starts, ends, strict=True)
    )
