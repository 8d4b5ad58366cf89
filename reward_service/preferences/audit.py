"""Whether a store is whole: the file, its records, their revisions, and its snapshots on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.contracts.errors import UserError
from cluster.contracts.rows.folders import read_snapshot
from reward_service.preferences.encoding import item_from, judgement_from
from reward_service.preferences.forget import tombstones
from reward_service.preferences.records import Judgement, prompt_hash
from reward_service.preferences.store import PreferenceStore


def audit_store(store: PreferenceStore) -> dict[str, Any]:
    """``problems``: what is wrong, in words; empty for a store that is whole. ``provenance``: share
    of labels for which each origin is known. ``snapshots`` and ``tombstones``: what was written and
    what was forgotten."""
    problems = [f"the file: {line}" for line in store.database.damage()]
    snapshots: list[dict[str, Any]] = []
    if not problems:
        problems += _records(store)
        snapshots, broken = _snapshots(store)
        problems += broken
    judgements = [] if problems else store.judgements()
    return {
        "problems": problems,
        "provenance": _provenance([entry for entry in judgements if entry.is_label]),
        "snapshots": snapshots,
        "tombstones": [
            {
                "when": stone.created_at,
                "kind": stone.kind,
                "items": stone.items,
                "judgements": stone.judgements,
                "snapshots": [use.sha256 for use in stone.snapshots],
                "models": list(stone.models),
            }
            for stone in tombstones(store)
        ],
    }


def _records(store: PreferenceStore) -> list[str]:
    problems: list[str] = []
    with store.database.reading() as db:
        items = db.execute("SELECT * FROM items").fetchall()
        rows = db.execute("SELECT * FROM judgements").fetchall()
    for row in items:
        try:
            if prompt_hash(item_from(row).messages) != row["prompt_hash"]:
                problems.append(f"item {row['id']!r}: its prompt does not have its hash")
        except (ValueError, KeyError, TypeError) as problem:
            problems.append(f"item {row['id']!r} cannot be read: {problem}")
    entries: dict[str, Judgement] = {}
    for row in rows:
        try:
            entries[row["id"]] = judgement_from(row)
        except (ValueError, KeyError, TypeError) as problem:
            problems.append(f"judgement {row['id']!r} cannot be read: {problem}")
    return problems + _revisions(entries)


def _revisions(entries: dict[str, Judgement]) -> list[str]:
    problems = []
    newest: dict[tuple[str, str], int] = {}
    replaced = {entry.supersedes for entry in entries.values()}
    for entry in entries.values():
        earlier = entries.get(entry.supersedes or "")
        key = (entry.item_id, entry.annotator_id)
        if earlier is not None and (earlier.item_id, earlier.annotator_id) != key:
            problems.append(f"judgement {entry.id!r} supersedes one of another annotator or item")
        newest[key] = newest.get(key, 0) + (entry.id not in replaced)
    problems += [
        f"item {item!r} has {count} judgements in force by {who!r}"
        for (item, who), count in newest.items()
        if count != 1
    ]
    return problems


def _snapshots(store: PreferenceStore) -> tuple[list[dict[str, Any]], list[str]]:
    found, problems = [], []
    with store.database.reading() as db:
        rows = db.execute("SELECT * FROM snapshots ORDER BY rowid").fetchall()
    for row in rows:
        path, state = Path(row["path"]), "whole"
        if not path.exists():
            state = "not there"
        else:
            try:
                if read_snapshot(path)["sha256"] != row["sha256"]:
                    state = "another snapshot"
            except UserError as problem:
                state = problem.what
                problems.append(f"snapshot {path}: {problem.what}")
        found.append({"sha256": row["sha256"], "path": str(path), "state": state})
    return found, problems


def _provenance(labels: Sequence[Judgement]) -> dict[str, float | None]:
    known = {
        "guideline": sum(bool(entry.guideline_version) for entry in labels),
        "consent": sum(entry.consent not in ("", "unknown") for entry in labels),
        "time_taken": sum(entry.duration_s is not None for entry in labels),
        "position_shown": sum(bool(entry.shown_order) for entry in labels),
    }
    return {name: count / len(labels) if labels else None for name, count in known.items()}
