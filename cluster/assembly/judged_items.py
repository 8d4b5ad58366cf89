"""Completions to be compared, from whatever holds them, as items of a preference store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cluster.assembly.preferences import open_store
from cluster.contracts.errors import UserError
from cluster.contracts.rows.files import BadRow, raw_rows
from cluster.pages.labelling.items import read_items
from reward_service.preferences.imports import UNKNOWN, add_preferences, read_preferences
from reward_service.preferences.records import Item, utc_now
from reward_service.preferences.store import PreferenceStore


def add_items_of(path: str, split: str, store: PreferenceStore) -> list[Item]:
    """The items that a file or another store holds, after adding them to ``store``, with the
    judgements that are there already. Items with one completion are left out. Completions that were
    sampled become pairs, the same as on the labelling page.

    Raises UserError for a file that holds none.
    """
    if path.endswith(".db"):
        items = _of_store(Path(path), store)
    elif _is_sampled(path, split):
        items = read_items(path, completions=2, license=UNKNOWN, created_at=utc_now()).items
        store.add_items(new_items(store, items))
    else:
        read = read_preferences(path, split=split)
        add_preferences(store, read)
        items = list(read.items.values())
    items = [item for item in items if len(item.completions) > 1]
    if not items:
        raise UserError(
            "holds no prompt with two different completions to compare",
            where=path,
            fix="sample more: accord generate MODEL PROMPTS --samples 2",
        )
    return items


def _is_sampled(path: str, split: str) -> bool:
    try:
        first = next(iter(raw_rows(path, split))).columns()
    except (BadRow, StopIteration):
        return False  # the reader of comparisons says what is wrong with it
    return bool({"completion", "completion_a"} & set(first)) and "chosen" not in first


def new_items(store: PreferenceStore, items: Sequence[Item]) -> list[Item]:
    """Those that are not in the store yet: a second run has another date for the same content."""
    there = {item.id for item in store.items()}
    return [item for item in items if item.id not in there]


def _of_store(path: Path, store: PreferenceStore) -> list[Item]:
    other: PreferenceStore = open_store(path, must_exist=True)
    items = other.items()
    if path.resolve() != store.path.resolve():
        store.add(items, other.judgements(history=True))
    return items
