"""The completions a run was trained on, as they lie in its ``rollouts/*.parquet``, for people."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.contracts.chat import is_text
from cluster.contracts.errors import UserError
from cluster.contracts.records import Message, Rollout

COLUMNS = (
    "group_id", "sample", "prompt_id", "messages", "text", "score", "score_parts", "vetoes",
    "finish_reason", "span_version", "metadata",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleInfo:
    """One prompt and one completion of it.

    ``step``: the learner step trained on it, from 1; None outside training. ``score`` and ``parts``
    (unweighted, by reward source): None and empty where nothing was scored. ``finish_reason``:
    "stop", or "length" where ``rollout.max_tokens`` cut it. ``versions``: policy versions of its
    first and last token.
    """

    step: int | None
    group: int
    sample: int
    prompt_id: str
    prompt: tuple[Message, ...]
    completion: str
    score: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    vetoes: tuple[str, ...] = ()
    finish_reason: str = "stop"
    tokens: int = 0
    versions: tuple[int, int] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def sampled_steps(run_dir: Path) -> list[int]:
    """Steps whose completions are on disk, ascending, from 1."""
    found = (Path(run_dir) / "rollouts").glob("step-*.parquet")
    return sorted(int(path.stem.removeprefix("step-")) + 1 for path in found)


def sample_file(run_dir: Path, step: int) -> Path:
    return Path(run_dir) / "rollouts" / f"step-{step - 1:06d}.parquet"


def read_samples(run_dir: Path, step: int) -> list[SampleInfo]:
    """Completions of ``step`` (from 1) by group and sample. Raises UserError where there is no file
    of it or the file is damaged."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path = sample_file(run_dir, step)
    if not path.is_file():
        raise UserError(
            f"holds no completions of step {step}",
            where=str(path.parent),
            fix="choose a step that was trained with logging.save_rollouts = true",
        )
    try:
        table = pq.read_table(path, columns=[*COLUMNS, "token_ids"])
    except (pa.ArrowException, OSError) as problem:
        raise UserError(
            f"is damaged: {problem}", where=str(path), fix="leave that step out"
        ) from None
    lengths = pc.list_value_length(table["token_ids"]).to_pylist()
    rows = table.select(list(COLUMNS)).to_pylist()
    found = [_sample(row, tokens, step) for row, tokens in zip(rows, lengths, strict=True)]
    return sorted(found, key=lambda sample: (sample.group, sample.sample))


def _sample(row: Mapping[str, Any], tokens: int, step: int) -> SampleInfo:
    versions = row["span_version"]
    return SampleInfo(
        step=step,
        group=row["group_id"],
        sample=row["sample"],
        prompt_id=row["prompt_id"],
        prompt=tuple(json.loads(row["messages"])),
        completion=row["text"],
        score=row["score"],
        parts=json.loads(row["score_parts"]),
        vetoes=tuple(row["vetoes"] or ()),
        finish_reason=row["finish_reason"],
        tokens=tokens,
        versions=(min(versions), max(versions)) if versions else None,
        metadata=json.loads(row["metadata"]),
    )


def unscored(rollouts: Sequence[Rollout], samples_per_prompt: int) -> list[SampleInfo]:
    """Completions that were only sampled, in their order."""
    return [
        SampleInfo(
            step=None,
            group=at // samples_per_prompt,
            sample=rollout.sample_index,
            prompt_id=rollout.prompt.id,
            prompt=rollout.prompt.messages,
            completion=rollout.text,
            finish_reason=rollout.completion.finish_reason,
            tokens=len(rollout.completion.token_ids),
            metadata=rollout.prompt.metadata,
        )
        for at, rollout in enumerate(rollouts)
    ]


def pick(samples: Sequence[SampleInfo], count: int, seed: int) -> list[tuple[str, SampleInfo]]:
    """``count`` samples, none twice, each with why it is there: a third "best", a third "worst",
    the rest "random" (all of them without scores), drawn by ``seed`` from those that are left."""
    count = min(count, len(samples))
    ranked = [s for s in samples if s.score is not None]
    ranked.sort(key=lambda s: -(s.score or 0.0))
    best = ranked[: -(-count // 3)]
    worst = ranked[len(best) :][-((count + 1) // 3) :][::-1] if count > 1 else []
    taken = {id(sample) for sample in (*best, *worst)}
    left = [sample for sample in samples if id(sample) not in taken]
    drawn = random.Random(seed).sample(left, count - len(taken))
    reasons = (("best", best), ("worst", worst), ("random", drawn))
    return [(reason, sample) for reason, found in reasons for sample in found]


def prompt_text(messages: Sequence[Message]) -> str:
    """Plain text and a single question as they are; a conversation with its speakers."""
    if is_text(messages) or [message["role"] for message in messages] == ["user"]:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
