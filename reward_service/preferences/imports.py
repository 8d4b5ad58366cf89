"""Files -> items and judgements of a store. Either all rows of a file are imported or none.

The rows are read as everywhere (``cluster.contracts.rows``): JSONL, JSON, CSV, Parquet and data
sets in the shapes of TRL, HH-RLHF, verl, NeMo, UltraFeedback, Argilla and Label Studio, and of
Accord's own export.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.contracts.rows.columns import optional_number
from cluster.contracts.rows.exports import Verdict
from cluster.contracts.rows.files import BadRow, Columns, Place
from cluster.contracts.rows.judged import JudgedShape, judged_shape
from cluster.contracts.rows.reader import LeftOut, read_rows
from reward_service.preferences.forgotten import UNNAMED, Forgotten
from reward_service.preferences.records import (
    Candidate,
    ChosenBy,
    Item,
    Judgement,
    derived_id,
    utc_now,
)
from reward_service.preferences.store import PreferenceStore

UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """``rows`` read, and how many items and labels were new. ``forgotten``: how many items and
    labels were left out because the store was told to forget them."""

    rows: int
    items: int
    labels: int
    forgotten: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPreferences:
    """``rows`` that were read, their items and judgements by id, and what was left out as bad."""

    rows: int
    items: Mapping[str, Item]
    judgements: Mapping[str, Judgement]
    left_out: LeftOut


def read_preferences(
    path: str | Path,
    *,
    split: str = "train",
    consent: str = UNKNOWN,
    license: str = UNKNOWN,
    source: str = "",
    skip_bad: bool = False,
) -> ReadPreferences:
    """The judgements of a file, for ``add_preferences``.

    ``margin``, ``annotator`` and what Accord exports are kept where present; the arguments stand in
    where a row does not say. Rows that name no annotator count as judgements of different ones.
    Which completion becomes "a" follows from a hash, so that the order tells nothing. ``skip_bad``
    leaves bad rows out and counts them. Raises UserError naming file, row and column.
    """
    items: dict[str, Item] = {}
    judgements: dict[str, Judgement] = {}
    unnamed: Counter[str] = Counter()

    def make(place: Place, columns: Columns) -> None:
        row = judged_shape(columns)
        try:
            item, order = _item(columns, row, license, source or Path(path).name)
            found = [
                _judgement(columns, verdict, item, order, consent, unnamed)
                for verdict in row.verdicts
            ]
        except (ValueError, TypeError, KeyError) as error:
            raise BadRow(f"{error}") from error
        if items.get(item.id, item) != item:
            raise BadRow(f"item {item.id!r} differs from an earlier row's")
        for entry in found:
            if judgements.get(entry.id, entry) != entry:
                raise BadRow(f"{entry.annotator_id!r} judges item {item.id!r} a second time")
        items[item.id] = item
        judgements.update((entry.id, entry) for entry in found)

    read = read_rows(str(path), split, make, skip_bad=skip_bad, skip_with="--skip-bad-rows")
    return ReadPreferences(
        rows=len(read.items), items=items, judgements=judgements, left_out=read.left_out
    )


def add_preferences(store: PreferenceStore, read: ReadPreferences) -> ImportReport:
    """Add what was read, all or none; a file added twice adds nothing the second time. What the
    store was told to forget stays out."""
    gone = Forgotten.of(store)
    wanted = {key: item for key, item in read.items.items() if not gone.item(item)}
    entries = [
        entry
        for entry in read.judgements.values()
        if entry.item_id in wanted and not gone.judgement(entry)
    ]
    items = _as_stored(store.items(), wanted)
    known = {entry.id: entry for entry in store.judgements(history=True)}
    new = [_dated(entry, known.get(entry.id)) for entry in entries]
    new_items, new_labels = store.add(items.values(), new)
    left_out = len(read.items) - len(wanted) + len(read.judgements) - len(entries)
    return ImportReport(rows=read.rows, items=new_items, labels=new_labels, forgotten=left_out)


def _item(
    columns: Columns, row: JudgedShape, license: str, source: str
) -> tuple[Item, tuple[int, ...]]:
    """The item, and for each of its completions the place that it has in the row."""
    texts = row.completions
    for place, text in enumerate(texts):
        if text in texts[:place]:
            same = "chosen and rejected are" if "chosen" in columns else "two completions are"
            raise BadRow(f"{same} the same completion")
    order = tuple(
        sorted(range(len(texts)), key=lambda place: derived_id(row.messages, texts[place]))
    )
    if columns.get("choice") and len(texts) == 2:
        order = _order_by_choice(columns, order)
    chosen_by = _plain_json(columns.get("chosen_by"))
    item = Item(
        id=columns.get("item_id") or derived_id(row.messages, *(texts[place] for place in order)),
        messages=row.messages,
        completions=tuple(_candidate(columns, row, place) for place in order),
        topic=_text(columns, "topic"),
        source=_text(columns, "source") or source,
        license=_text(columns, "license") or license,
        created_at=_text(columns, "item_created_at") or _text(columns, "created_at"),
        chosen_by=ChosenBy(**chosen_by) if chosen_by else None,
    )
    return item, order


def _order_by_choice(columns: Columns, order: tuple[int, ...]) -> tuple[int, ...]:
    """A row that Accord exported says which of the two was called "a"."""
    choice = columns["choice"]
    if choice not in ("a", "b"):
        raise BadRow(f"column 'choice' holds {choice!r}, which is neither a nor b")
    return (0, 1) if choice == "a" else (1, 0)


def _candidate(columns: Columns, row: JudgedShape, place: int) -> Candidate:
    if len(row.completions) > 2 or "chosen" not in columns:
        writer = row.writers[place] if row.writers else None
        return Candidate(text=row.completions[place], policy_version=writer)
    end = ("chosen", "rejected")[place]
    return Candidate(
        text=row.completions[place],
        policy_version=columns.get(f"policy_version_{end}"),
        run=columns.get(f"run_{end}"),
        sampling=_plain_json(columns.get(f"sampling_{end}")),
    )


def _judgement(
    columns: Columns,
    verdict: Verdict,
    item: Item,
    order: tuple[int, ...],
    consent: str,
    unnamed: Counter[str],
) -> Judgement:
    annotator = verdict.annotator or _text(columns, "annotator")
    if not annotator:
        annotator = f"{UNNAMED}{unnamed[item.id]}"
        unnamed[item.id] += 1
    own = isinstance(columns.get("id"), str) and "item_id" in columns  # exported by Accord
    criteria = _plain_json(columns.get("criteria")) or {}
    if verdict.scores:
        criteria = {**criteria, "scores": [verdict.scores[place] for place in order]}
    duration_s = verdict.duration_s
    return Judgement(
        id=columns["id"] if own else derived_id(item.id, annotator),
        item_id=item.id,
        annotator_id=annotator,
        answer="all_bad" if verdict.all_bad else "ranking",
        ranks=tuple(verdict.ranks[place] for place in order) if verdict.ranks else (),
        strength=verdict.strength,
        rationale=verdict.rationale or _text(columns, "rationale"),
        criteria=criteria,
        shown_order=_text(columns, "shown_order"),
        duration_s=optional_number(columns, "duration_s") if duration_s is None else duration_s,
        guideline_version=_text(columns, "guideline_version"),
        guideline_sha256=_text(columns, "guideline_sha256"),
        consent=_text(columns, "consent") or consent,
        source=columns.get("judged_by") or "import",
        judge=_plain_json(columns.get("judge")),
        created_at=verdict.created_at or _text(columns, "created_at"),
    )


def _text(columns: Columns, name: str) -> str:
    """A column of text; of another shape it is something else of the same name."""
    value = columns.get(name)
    return value if isinstance(value, str) else "" if value is None else str(value)


def _plain_json(value: Any) -> Any:
    """Columns without a fixed shape are JSON text in a Parquet file (``export.write_parquet``)."""
    return json.loads(value) if isinstance(value, str) and value else value


def _as_stored(stored: Iterable[Item], new: Mapping[str, Item]) -> dict[str, Item]:
    """Rows without a date get now, or the date they were given when they were imported before; of
    an item that is stored with why it is asked, this is kept."""
    known = {item.id: item for item in stored}
    now = utc_now()

    def as_stored(item: Item) -> Item:
        before = known.get(item.id)
        date = item.created_at or (before.created_at if before else now)
        chosen_by = item.chosen_by or (before.chosen_by if before else None)
        return replace(item, created_at=date, chosen_by=chosen_by)

    return {key: as_stored(item) for key, item in new.items()}


def _dated(judgement: Judgement, known: Judgement | None) -> Judgement:
    if judgement.created_at:
        return judgement
    return replace(judgement, created_at=known.created_at if known is not None else utc_now())
