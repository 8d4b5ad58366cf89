"""Judgements -> rows in TRL's preference shape (prompt, chosen, rejected).

One row per two completions of which a judgement in force prefers one. Ties and "both bad" hold no
pair; they are left out and counted. Chat prompts become lists of messages, plain-text prompts
strings. What is known of item and judgement goes along in further columns, so that importing the
pairs of a file loses nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.contracts.chat import is_text
from cluster.contracts.errors import UserError
from reward_service.preferences.records import LETTERS, Item, Judgement, preferred_pairs
from reward_service.preferences.store import PreferenceStore

Judged = tuple[Item, Judgement]

# Columns without a fixed shape, which in Parquet are JSON text.
LOOSE = frozenset({"criteria", "judge", "sampling_chosen", "sampling_rejected", "chosen_by"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """``rows`` written; labels in force without a pair; items nobody labelled; records replaced."""

    rows: int
    ties: int
    both_bad: int
    unlabelled: int
    superseded: int


def export_preferences(
    store: PreferenceStore, path: str | Path, *, drop_annotator: bool = False
) -> ExportReport:
    """Write ``path``: .jsonl or .parquet, beside its place and renamed. ``drop_annotator`` leaves
    out who labelled. Raises UserError for another ending, and where it cannot be written."""
    target = Path(path)
    if target.suffix not in (".jsonl", ".parquet"):
        raise UserError(
            f"no export to {target.suffix or 'a file without an ending'!r}",
            where=str(path),
            fix="end the name with .jsonl or .parquet",
        )
    rows = pair_rows(store.judged(), drop_annotator=drop_annotator)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".jsonl":
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            partial.write_text(text, encoding="utf-8")
        else:
            write_parquet(partial, rows, ("prompt", "chosen", "rejected"), LOOSE)
        partial.replace(target)
    except OSError as problem:
        raise UserError(f"cannot be written: {problem.strerror}", where=str(path)) from None
    finally:
        partial.unlink(missing_ok=True)
    stats = store.stats()
    return ExportReport(
        rows=len(rows),
        ties=stats["choices"]["tie"],
        both_bad=stats["choices"]["both_bad"],
        unlabelled=stats["unlabelled"],
        superseded=stats["superseded"],
    )


def pair_rows(judged: Iterable[Judged], *, drop_annotator: bool = False) -> list[dict[str, Any]]:
    """The pairs of judgements, in the order of these."""
    return [
        _pair_row(item, judgement, better, worse, drop_annotator)
        for item, judgement in judged
        for better, worse in preferred_pairs(judgement.ranks)
    ]


def _pair_row(
    item: Item, judgement: Judgement, better: int, worse: int, drop_annotator: bool
) -> dict[str, Any]:
    chosen, rejected = item.completions[better], item.completions[worse]
    # A pair out of a longer ranking is an item of its own when it is imported.
    part = "" if len(item.completions) == 2 else f"/{LETTERS[better]}>{LETTERS[worse]}"
    pair_of_item = "" if not part else f"/{''.join(sorted(part[1::2]))}"
    return {
        "prompt": prompt_cell(item),
        "chosen": completion_cell(item, chosen.text),
        "rejected": completion_cell(item, rejected.text),
        "margin": judgement.strength,
        **judgement_columns(judgement, drop_annotator),
        "id": judgement.id + part,
        "item_id": item.id + pair_of_item,
        "choice": judgement.choice if not part else None,
        "shown_order": judgement.shown_order if not part else "",
        "policy_version_chosen": chosen.policy_version,
        "policy_version_rejected": rejected.policy_version,
        "run_chosen": chosen.run,
        "run_rejected": rejected.run,
        "sampling_chosen": chosen.sampling,
        "sampling_rejected": rejected.sampling,
        **item_columns(item),
    }


def judgement_columns(judgement: Judgement, drop_annotator: bool = False) -> dict[str, Any]:
    return {
        "annotator": "" if drop_annotator else judgement.annotator_id,
        "criteria": dict(judgement.criteria),
        "rationale": judgement.rationale,
        "duration_s": judgement.duration_s,
        "guideline_version": judgement.guideline_version,
        "guideline_sha256": judgement.guideline_sha256,
        "consent": judgement.consent,
        "judged_by": judgement.source,
        "judge": judgement.judge,
        "created_at": judgement.created_at,
    }


def item_columns(item: Item) -> dict[str, Any]:
    return {
        "topic": item.topic,
        "source": item.source,
        "license": item.license,
        "item_created_at": item.created_at,
        "chosen_by": None if item.chosen_by is None else asdict(item.chosen_by),
    }


def prompt_cell(item: Item) -> Any:
    if is_text(item.messages):
        return item.messages[0]["content"]
    return [dict(message) for message in item.messages]


def completion_cell(item: Item, text: str) -> Any:
    return text if is_text(item.messages) else [{"role": "assistant", "content": text}]


def _json_cell(value: Any) -> str:
    return "{}" if value == {} else json.dumps(value, ensure_ascii=False)


def write_parquet(
    path: Path, rows: Sequence[Mapping[str, Any]], empty: Sequence[str], loose: frozenset[str]
) -> None:
    """``empty``: the columns of a file without rows. ``loose``: columns that become JSON text; so
    do prompt and completions where chat is mixed with plain text, which one Arrow column cannot
    hold."""
    names = list(rows[0]) if rows else list(empty)
    if len({isinstance(row["prompt"], str) for row in rows}) > 1:
        loose = loose | {"prompt", "chosen", "rejected", "completions", "completion"}
    columns = {
        name: [row[name] if row[name] is None else _json_cell(row[name]) for row in rows]
        if name in loose
        else [row[name] for row in rows]
        for name in names
    }
    table = pa.table(columns).replace_schema_metadata({"accord.schema": "preferences/2"})
    pq.write_table(table, path)
