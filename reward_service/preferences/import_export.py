"""Preferences out to and in from files in TRL's preference shape (prompt, chosen, rejected).

Out: one row a current label that prefers an answer. Ties and "both bad" hold no pair; they are left
out and counted. Chat prompts become lists of messages, plain-text prompts strings. Everything known
of item and label goes along in further columns, so that importing the file loses nothing.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.contracts.chat import TEXT, is_text
from cluster.contracts.errors import UserError
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


def import_jsonl(
    store: PreferenceStore,
    path: str | Path,
    *,
    consent: str = UNKNOWN,
    license: str = UNKNOWN,
    source: str = "",
) -> ImportReport:
    """Add the pairs of a TRL-shaped JSONL file, all or none; a file imported twice adds nothing.

    Rows: prompt, chosen, rejected as strings or messages, or chosen and rejected as messages that
    share their beginning. ``margin``, ``annotator`` and what Accord exports are kept where present;
    the arguments stand in where a row does not say. Rows that name no annotator count as labels of
    different ones. Which answer becomes "a" follows from a hash, so that the order tells nothing.
    Raises UserError naming file and row.
    """
    items: dict[str, PreferenceItem] = {}
    labels: dict[str, PreferenceLabel] = {}
    rows = 0
    unnamed: Counter[str] = Counter()
    for number, row in _rows(Path(path)):
        rows += 1
        where = f"{path}, row {number}"
        try:
            item = _item(row, license, source or Path(path).name)
            label = _label(row, item, consent, unnamed)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{error}", where=where, fix="a row needs prompt, chosen and rejected"
            ) from error
        if items.setdefault(item.id, item) != item:
            raise UserError(f"item {item.id!r} differs from an earlier row's", where=where)
        if labels.setdefault(label.id, label) != label:
            raise UserError(
                f"{label.annotator_id!r} labels item {item.id!r} a second time", where=where
            )
    items = _as_stored(store.items(), items)
    known = {label.id: label for label in store.labels(history=True)}
    new = [_dated(label, known.get(label.id)) for label in labels.values()]
    new_items, new_labels = store.add(items.values(), new)
    return ImportReport(rows=rows, items=new_items, labels=new_labels)


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", where=str(path)) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"not JSON: {error}", where=f"{path}, row {number}") from error
        if not isinstance(row, dict):
            raise UserError("not a JSON object", where=f"{path}, row {number}")
        yield number, row


def _item(row: Mapping[str, Any], license: str, source: str) -> PreferenceItem:
    messages, chosen, rejected = _pair(row)
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same answer")
    first, second = sorted((chosen, rejected), key=lambda text: derived_id(messages, text))
    choice = row.get("choice") or ("a" if chosen == first else "b")
    if choice not in ("a", "b"):
        raise ValueError(f"choice {choice!r} is neither a nor b")
    won, lost = ("a", "b") if choice == "a" else ("b", "a")
    sides: dict[str, Any] = {f"answer_{won}": chosen, f"answer_{lost}": rejected}
    for column in ("policy_version", "sampling"):
        for side, end in ((won, "chosen"), (lost, "rejected")):
            sides[f"{column}_{side}"] = row.get(f"{column}_{end}")
    return PreferenceItem(
        id=row.get("item_id") or derived_id(messages, first, second),
        messages=tuple(messages),
        source=row.get("source") or source,
        license=row.get("license") or license,
        created_at=row.get("item_created_at") or row.get("created_at") or "",
        **sides,
    )


def _label(
    row: Mapping[str, Any], item: PreferenceItem, consent: str, unnamed: Counter[str]
) -> PreferenceLabel:
    annotator = row.get("annotator")
    if not annotator:
        annotator = f"{UNKNOWN}-{unnamed[item.id]}"
        unnamed[item.id] += 1
    margin = row.get("margin")
    return PreferenceLabel(
        id=row.get("id") or derived_id(item.id, annotator),
        item_id=item.id,
        annotator_id=annotator,
        choice="a" if _pair(row)[1] == item.answer_a else "b",
        strength=None if margin is None else float(margin),
        criteria=row.get("criteria") or {},
        shown_order=row.get("shown_order") or "ab",
        duration_s=row.get("duration_s"),
        guideline_version=row.get("guideline_version") or "",
        consent=row.get("consent") or consent,
        created_at=row.get("created_at") or "",
    )


def _pair(row: Mapping[str, Any]) -> tuple[list[dict[str, str]], str, str]:
    missing = [key for key in ("chosen", "rejected") if key not in row]
    if missing:
        raise ValueError(f"no {missing[0]!r}; the row has {sorted(row)}")
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row:
        prompt = row["prompt"]
        messages = [{"role": TEXT, "content": prompt}] if isinstance(prompt, str) else prompt
        return _messages(messages), _answer(chosen, "chosen"), _answer(rejected, "rejected")
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise ValueError("no 'prompt', and chosen and rejected are texts: where it ends is unknown")
    if not chosen or not rejected or chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected are not one prompt with two last messages")
    return (
        _messages(chosen[:-1]),
        _answer(chosen[-1:], "chosen"),
        _answer(rejected[-1:], "rejected"),
    )


def _messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError("the prompt is neither text nor a list of messages")
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    if not all(isinstance(text, str) for message in plain for text in message.values()):
        raise ValueError("a message of the prompt is not text")
    return plain


def _answer(answer: Any, key: str) -> str:
    if isinstance(answer, list):
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            raise ValueError(f"{key!r} is not one message of the assistant")
        answer = answer[0]["content"]
    if not isinstance(answer, str):
        raise ValueError(f"{key!r} is a {type(answer).__name__}, not text")
    return answer


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
