"""Preferences out to and in from files in TRL's preference shape (prompt, chosen, rejected).

Out: one row a current label that prefers an answer. Ties and "both bad" hold no pair; they are left
out and counted. Chat prompts become lists of messages, plain-text prompts strings. Everything known
of item and label goes along in further columns, so that importing the file loses nothing.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.contracts.chat import is_text
from cluster.contracts.errors import UserError
from cluster.contracts.rows.columns import optional_number
from cluster.contracts.rows.files import BadRow, Columns, Place
from cluster.contracts.rows.reader import LeftOut, read_rows
from cluster.contracts.rows.shapes import ComparisonShape, comparison_shape
from reward_service.preferences.labels import PreferenceItem, PreferenceLabel, derived_id
from reward_service.preferences.store import PreferenceStore

UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """``rows`` written; current labels without a pair; items nobody labelled; labels replaced."""

    rows: int
    ties: int
    both_bad: int
    unlabelled: int
    superseded: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """``rows`` read, and how many items and labels were new."""

    rows: int
    items: int
    labels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPreferences:
    """``rows`` that were read, their items and labels by id, and what was left out as bad."""

    rows: int
    items: Mapping[str, PreferenceItem]
    labels: Mapping[str, PreferenceLabel]
    left_out: LeftOut


def export_preferences(
    store: PreferenceStore, path: str | Path, *, drop_annotator: bool = False
) -> ExportReport:
    """Write ``path``: .jsonl or .parquet, beside its place and renamed. ``drop_annotator`` leaves
    out who labelled. Raises UserError for another ending."""
    target = Path(path)
    if target.suffix not in (".jsonl", ".parquet"):
        raise UserError(
            f"no export to {target.suffix or 'a file without an ending'!r}",
            where=str(path),
            fix="end the name with .jsonl or .parquet",
        )
    rows = [
        _row(item, label, drop_annotator)
        for item, label in store.labelled()
        if label.choice in ("a", "b")
    ]
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if target.suffix == ".jsonl":
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            partial.write_text(text, encoding="utf-8")
        else:
            _write_parquet(partial, rows)
        partial.replace(target)
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


def _row(item: PreferenceItem, label: PreferenceLabel, drop_annotator: bool) -> dict[str, Any]:
    won, lost = ("a", "b") if label.choice == "a" else ("b", "a")
    text = is_text(item.messages)

    def answer(side: str) -> Any:
        content = getattr(item, f"answer_{side}")
        return content if text else [{"role": "assistant", "content": content}]

    return {
        "prompt": item.messages[0]["content"] if text else [dict(m) for m in item.messages],
        "chosen": answer(won),
        "rejected": answer(lost),
        "margin": label.strength,
        "annotator": "" if drop_annotator else label.annotator_id,
        "id": label.id,
        "item_id": item.id,
        "choice": label.choice,
        "criteria": dict(label.criteria),
        "shown_order": label.shown_order,
        "duration_s": label.duration_s,
        "guideline_version": label.guideline_version,
        "policy_version_chosen": getattr(item, f"policy_version_{won}"),
        "policy_version_rejected": getattr(item, f"policy_version_{lost}"),
        "sampling_chosen": getattr(item, f"sampling_{won}"),
        "sampling_rejected": getattr(item, f"sampling_{lost}"),
        "source": item.source,
        "license": item.license,
        "consent": label.consent,
        "created_at": label.created_at,
        "item_created_at": item.created_at,
    }


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Columns without a fixed shape (criteria, sampling) are JSON text; so are prompt and answers
    only when the store mixes chat with plain text, which one Arrow column cannot."""
    loose = {"criteria", "sampling_chosen", "sampling_rejected"}
    if len({isinstance(row["prompt"], str) for row in rows}) > 1:
        loose |= {"prompt", "chosen", "rejected"}
    names = list(rows[0]) if rows else ["prompt", "chosen", "rejected"]
    columns = {
        name: [
            json.dumps(row[name], ensure_ascii=False) if name in loose else row[name]
            for row in rows
        ]
        for name in names
    }
    table = pa.table(columns).replace_schema_metadata({"accord.schema": "preferences/1"})
    pq.write_table(table, path)


def read_preferences(
    path: str | Path,
    *,
    consent: str = UNKNOWN,
    license: str = UNKNOWN,
    source: str = "",
    skip_bad: bool = False,
) -> ReadPreferences:
    """The comparisons of a file, for ``add_preferences``.

    The rows are read as everywhere (``cluster.contracts.rows``: JSONL, CSV, Parquet, HH-RLHF, ...).
    ``margin``, ``annotator`` and what Accord exports are kept where present; the arguments stand in
    where a row does not say. Rows that name no annotator count as labels of different ones. Which
    answer becomes "a" follows from a hash, so that the order tells nothing. ``skip_bad`` leaves bad
    rows out and counts them. Raises UserError naming file and row.
    """
    items: dict[str, PreferenceItem] = {}
    labels: dict[str, PreferenceLabel] = {}
    unnamed: Counter[str] = Counter()

    def make(place: Place, columns: Columns) -> None:
        shape = comparison_shape(columns)
        try:
            item = _item(columns, shape, license, source or Path(path).name)
            label = _label(columns, shape, item, consent, unnamed)
        except (ValueError, TypeError, KeyError) as error:
            raise BadRow(f"{error}") from error
        if items.setdefault(item.id, item) != item:
            raise BadRow(f"item {item.id!r} differs from an earlier row's")
        if labels.setdefault(label.id, label) != label:
            raise BadRow(f"{label.annotator_id!r} labels item {item.id!r} a second time")

    read = read_rows(str(path), "train", make, skip_bad=skip_bad, skip_with="--skip-bad-rows")
    return ReadPreferences(rows=len(read.items), items=items, labels=labels, left_out=read.left_out)


def add_preferences(store: PreferenceStore, read: ReadPreferences) -> ImportReport:
    """Add what was read, all or none; a file added twice adds nothing the second time."""
    items = _as_stored(store.items(), read.items)
    known = {label.id: label for label in store.labels(history=True)}
    new = [_dated(label, known.get(label.id)) for label in read.labels.values()]
    new_items, new_labels = store.add(items.values(), new)
    return ImportReport(rows=read.rows, items=new_items, labels=new_labels)


def _item(columns: Columns, shape: ComparisonShape, license: str, source: str) -> PreferenceItem:
    messages, chosen, rejected = shape.messages, shape.chosen, shape.rejected
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same answer")
    first, second = sorted((chosen, rejected), key=lambda text: derived_id(messages, text))
    choice = columns.get("choice") or ("a" if chosen == first else "b")
    if choice not in ("a", "b"):
        raise BadRow(f"column 'choice' holds {choice!r}, which is neither a nor b")
    won, lost = ("a", "b") if choice == "a" else ("b", "a")
    sides: dict[str, Any] = {f"answer_{won}": chosen, f"answer_{lost}": rejected}
    for side, end in ((won, "chosen"), (lost, "rejected")):
        sides[f"policy_version_{side}"] = columns.get(f"policy_version_{end}")
        sides[f"sampling_{side}"] = _plain_json(columns.get(f"sampling_{end}"))
    return PreferenceItem(
        id=columns.get("item_id") or derived_id(messages, first, second),
        messages=messages,
        source=columns.get("source") or source,
        license=columns.get("license") or license,
        created_at=columns.get("item_created_at") or columns.get("created_at") or "",
        **sides,
    )


def _label(
    columns: Columns,
    shape: ComparisonShape,
    item: PreferenceItem,
    consent: str,
    unnamed: Counter[str],
) -> PreferenceLabel:
    annotator = columns.get("annotator")
    if not annotator:
        annotator = f"{UNKNOWN}-{unnamed[item.id]}"
        unnamed[item.id] += 1
    return PreferenceLabel(
        id=columns.get("id") or derived_id(item.id, annotator),
        item_id=item.id,
        annotator_id=annotator,
        choice="a" if shape.chosen == item.answer_a else "b",
        strength=shape.margin,
        criteria=_plain_json(columns.get("criteria")) or {},
        shown_order=columns.get("shown_order") or "ab",
        duration_s=optional_number(columns, "duration_s"),
        guideline_version=columns.get("guideline_version") or "",
        consent=columns.get("consent") or consent,
        created_at=columns.get("created_at") or "",
    )


def _plain_json(value: Any) -> Any:
    """Columns without a fixed shape are JSON text in a Parquet file (``_write_parquet``)."""
    return json.loads(value) if isinstance(value, str) and value else value


def _as_stored(
    stored: Iterable[PreferenceItem], new: Mapping[str, PreferenceItem]
) -> dict[str, PreferenceItem]:
    """Rows without a date get now, or the date they were given when they were imported before."""
    dates = {item.id: item.created_at for item in stored}
    now = utc_now()
    return {
        key: item if item.created_at else replace(item, created_at=dates.get(key, now))
        for key, item in new.items()
    }


def _dated(label: PreferenceLabel, known: PreferenceLabel | None) -> PreferenceLabel:
    if label.created_at:
        return label
    return replace(label, created_at=known.created_at if known is not None else utc_now())


def utc_now() -> str:
    """Now, ISO 8601, UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0).isoformat()
