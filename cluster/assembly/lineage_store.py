"""The end of a lineage at the labels: what a store still holds of what a snapshot was made from."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from cluster.contracts.errors import UserError


def store_facts(path: Path) -> dict[str, Any]:
    """Counts and terms; annotators by number, never by pseudonym."""
    from reward_service.preferences.forget import tombstones
    from reward_service.preferences.store import PreferenceStore

    try:
        store = PreferenceStore(path)
        judged = store.judged()
    except UserError as problem:
        return {"problem": problem.what}
    labels = [(item, entry) for item, entry in judged if entry.is_label]
    guidelines = {entry.guideline_version: entry.guideline_sha256 for _, entry in labels}
    return {
        "labels": len(labels),
        "annotators": len({entry.annotator_id for _, entry in labels}),
        "sources": dict(Counter(entry.source for _, entry in labels)),
        "guidelines": {
            version or "not known": sha256 or "hash not known"
            for version, sha256 in guidelines.items()
        },
        "consents": dict(Counter(entry.consent for _, entry in labels)),
        "licenses": dict(Counter(item.license for item, _ in labels)),
        "forgotten": sum(stone.judgements for stone in tombstones(store)),
    }


def snapshot_link(
    path: Path, sha256: str, judgements_sha256: str
) -> tuple[Literal["matches", "changed", "gone", "forgotten"], str]:
    """Whether the store still holds every judgement of the snapshot, and if not, why."""
    from reward_service.preferences.forget import tombstones
    from reward_service.preferences.store import PreferenceStore

    try:
        store = PreferenceStore(path)
    except UserError as problem:
        return "changed", problem.what
    with store.database.reading() as db:
        query = "SELECT judgement_id FROM snapshot_judgements WHERE snapshot = ?"
        ids = sorted(row["judgement_id"] for row in db.execute(query, (sha256,)))
    if hashlib.sha256("\n".join(ids).encode()).hexdigest() == judgements_sha256:
        return "matches", f"all {len(ids)} judgements are there"
    stones = [s for s in tombstones(store) if any(use.sha256 == sha256 for use in s.snapshots)]
    if stones:
        return "forgotten", "; ".join(
            f"{stone.created_at}: {stone.judgements} judgements, by {stone.kind}"
            for stone in stones
        )
    return "changed", "the store does not know this snapshot or has lost judgements of it"


def snapshots_of(path: Path) -> list[dict[str, str]]:
    """Hash and path of every snapshot of a store, and of those that only its tombstones name."""
    from reward_service.preferences.forget import tombstones
    from reward_service.preferences.store import PreferenceStore

    store = PreferenceStore(path)
    with store.database.reading() as db:
        rows = db.execute("SELECT sha256, path FROM snapshots ORDER BY rowid").fetchall()
    found = {row["sha256"]: row["path"] for row in rows}
    for stone in tombstones(store):
        found |= {use.sha256: use.path for use in stone.snapshots if use.sha256 not in found}
    return [{"sha256": sha256, "path": place} for sha256, place in found.items()]
