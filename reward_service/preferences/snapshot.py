"""Snapshots: what a store held at one moment, in Parquet files that never change.

    NAME/  snapshot.json  train.parquet  test.parquet            pairs: prompt, chosen, rejected
                          train_rankings.parquet  ...            prompt, completions, ranks
                          train_demonstrations.parquet  ...      prompt, completion

The folder appears whole or not at all. Training reads it as any rows file
(``cluster.contracts.rows.folders``), which checks every hash first. Which side a prompt is on
follows from its hash alone, so train and test never share one, nor do two snapshots of a store.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.contracts.config.preferences import SnapshotConfig
from cluster.contracts.durable import FileDigest, digest_of, json_text, sync, sync_tree, write_text
from cluster.contracts.errors import UserError
from cluster.contracts.rows.folders import MANIFEST, SNAPSHOT_SCHEMA, snapshot_hash
from reward_service.preferences.export import (
    LOOSE,
    Judged,
    completion_cell,
    item_columns,
    judgement_columns,
    pair_rows,
    prompt_cell,
    write_parquet,
)
from reward_service.preferences.records import Candidate, prompt_hash, utc_now
from reward_service.preferences.store import PreferenceStore

PAIR_COLUMNS = ("prompt", "chosen", "rejected")
RANKING_COLUMNS = ("prompt", "completions", "ranks")
DEMONSTRATION_COLUMNS = ("prompt", "completion")


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """``sha256`` is of the rows: the same rows in the same splits give the same hash. ``counts``:
    rows per file. ``left_out``: judgements that a filter left out, by filter."""

    path: Path
    sha256: str
    counts: Mapping[str, int]
    left_out: Mapping[str, int] = field(default_factory=dict)


def write_snapshot(
    store: PreferenceStore,
    target: str | Path,
    config: SnapshotConfig,
    gates: Sequence[Mapping[str, Any]] = (),
    quality: Mapping[str, Any] | None = None,
) -> Snapshot:
    """Make the folder ``target``, and note in the store which judgements went into it. ``gates``,
    ``quality``: what the quality gates said, and the report on the store's judgements, for the
    manifest.

    Raises UserError when the folder exists, cannot be written, or would hold nothing.
    """
    target = Path(target)
    if target.exists():
        raise UserError(
            "exists already, and a snapshot never changes",
            where=str(target),
            fix="give the new snapshot another name",
        )
    kept, left_out = _filtered(store.judged(), config)
    if not kept:
        raise UserError(
            f"no judgement is left for a snapshot (left out: {_counts_text(left_out)})",
            where=str(store.path),
            fix="label more items, or loosen the filters in [snapshot]",
        )
    staging = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        staging.mkdir(parents=True)
        counts = _write_files(staging, kept, config)
        files = [digest_of(staging / name, name) for name in counts]
        manifest = _manifest(store, kept, left_out, counts, files, config)
        manifest |= {"gates": [dict(gate) for gate in gates], "quality": quality}
        write_text(staging / MANIFEST, json_text(manifest))
        for file in staging.iterdir():
            file.chmod(0o444)
        sync_tree(staging)
        _note(store, target, manifest, kept)  # first: no snapshot is there that ``forget`` misses
        staging.rename(target)
        sync(target.parent)
    except OSError as problem:
        raise UserError(
            f"the snapshot cannot be written: {problem.strerror}", where=str(target)
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Snapshot(path=target, sha256=manifest["sha256"], counts=counts, left_out=left_out)


def held_out(prompt: str, fraction: float, salt: str = "") -> bool:
    """Whether a prompt (its hash) belongs to the held-out part: always the same answer for the same
    prompt, so that no two parts ever share one. ``fraction`` in [0, 1] of prompts, on average."""
    digest = hashlib.sha256(f"{salt}\0{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def _filtered(
    judged: Sequence[Judged], config: SnapshotConfig
) -> tuple[list[Judged], dict[str, int]]:
    kept, left_out = [], Counter[str]()
    for item, judgement in judged:
        if not judgement.is_label:
            left_out[judgement.answer] += 1
        elif item.gold is not None:
            left_out["control items"] += 1
        elif config.sources and judgement.source not in config.sources:
            left_out["source"] += 1
        elif config.consents and judgement.consent not in config.consents:
            left_out["consent"] += 1
        elif config.licenses and item.license not in config.licenses:
            left_out["license"] += 1
        elif judgement.annotator_id in config.without_annotators:
            left_out["annotator"] += 1
        elif judgement.strength is not None and judgement.strength < config.min_strength:
            left_out["strength"] += 1
        else:
            kept.append((item, judgement))
    return kept, dict(left_out)


def _write_files(folder: Path, kept: Sequence[Judged], config: SnapshotConfig) -> dict[str, int]:
    """Rows per file. A kind of row that the store does not have gets no files."""
    sides: dict[str, list[Judged]] = {"train": [], "test": []}
    for item, judgement in kept:
        held = held_out(prompt_hash(item.messages), config.test_fraction)
        sides["test" if held else "train"].append((item, judgement))
    has_rankings = any(judgement.answer == "ranking" for _, judgement in kept)
    has_demonstrations = any(judgement.demonstration for _, judgement in kept)
    counts: dict[str, int] = {}
    for side, judged in sides.items():
        kinds: list[tuple[str, list[dict[str, Any]], tuple[str, ...]]]
        kinds = [(side, pair_rows(judged), PAIR_COLUMNS)]
        if has_rankings:
            kinds.append((f"{side}_rankings", _ranking_rows(judged), RANKING_COLUMNS))
        if has_demonstrations:
            kinds.append(
                (f"{side}_demonstrations", _demonstration_rows(judged), DEMONSTRATION_COLUMNS)
            )
        for name, rows, columns in kinds:
            write_parquet(folder / f"{name}.parquet", rows, columns, LOOSE)
            counts[f"{name}.parquet"] = len(rows)
    return counts


def _ranking_rows(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """Every ranking, pairs and ties included."""
    return [
        {
            "prompt": prompt_cell(item),
            "completions": [c.text for c in item.completions],
            "ranks": list(judgement.ranks),
            "strength": judgement.strength,
            "id": judgement.id,
            **judgement_columns(judgement),
            **item_columns(item),
        }
        for item, judgement in judged
        if judgement.answer == "ranking"
    ]


def _demonstration_rows(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": prompt_cell(item),
            "completion": completion_cell(item, judgement.demonstration),
            "id": judgement.id,
            **judgement_columns(judgement),
            **item_columns(item),
        }
        for item, judgement in judged
        if judgement.demonstration
    ]


def _manifest(
    store: PreferenceStore,
    kept: Sequence[Judged],
    left_out: Mapping[str, int],
    counts: Mapping[str, int],
    files: Sequence[FileDigest],
    config: SnapshotConfig,
) -> dict[str, Any]:
    ids = "\n".join(sorted(judgement.id for _, judgement in kept))
    return {
        "schema": SNAPSHOT_SCHEMA,
        "sha256": snapshot_hash(files),
        "created_at": utc_now(),
        "parents": {
            "store": str(store.path),
            "judgements_sha256": hashlib.sha256(ids.encode()).hexdigest(),
            "snapshot": last_snapshot(store),
        },
        "filters": config.model_dump(exclude={"test_fraction"}),
        "split": {"by": "prompt hash", "test_fraction": config.test_fraction},
        "counts": {
            "judgements": len(kept),
            "prompts": len({prompt_hash(item.messages) for item, _ in kept}),
            "annotators": len({judgement.annotator_id for _, judgement in kept}),
            "sources": dict(Counter(judgement.source for _, judgement in kept)),
            "guidelines": dict(Counter(judgement.guideline_version for _, judgement in kept)),
            "consents": dict(Counter(judgement.consent for _, judgement in kept)),
            "licenses": dict(Counter(item.license for item, _ in kept)),
            "origins": dict(Counter(item.source for item, _ in kept)),
            "writers": dict(Counter(_writer(c) for item, _ in kept for c in item.completions)),
            "left_out": dict(left_out),
        },
        "files": [
            {"name": f.name, "rows": counts[f.name], "nbytes": f.nbytes, "sha256": f.sha256}
            for f in files
        ],
    }


def _writer(candidate: Candidate) -> str:
    """Which policy wrote a completion: its run and version, as far as they are known."""
    known = [part for part in (candidate.run, candidate.policy_version) if part]
    return " ".join(known) or "not known"


def last_snapshot(store: PreferenceStore) -> str | None:
    """Hash of the store's newest snapshot."""
    with store.database.reading() as db:
        row = db.execute("SELECT sha256 FROM snapshots ORDER BY rowid DESC LIMIT 1").fetchone()
    return None if row is None else str(row["sha256"])


def _note(
    store: PreferenceStore, target: Path, manifest: Mapping[str, Any], kept: Sequence[Judged]
) -> None:
    """In the store: which judgements the snapshot holds, for ``forget``."""
    sha256 = manifest["sha256"]
    with store.database.writing() as db:
        db.execute(
            "INSERT OR IGNORE INTO snapshots VALUES (?, ?, ?, ?)",
            (sha256, str(target.absolute()), len(kept), manifest["created_at"]),
        )
        db.executemany(
            "INSERT OR IGNORE INTO snapshot_judgements VALUES (?, ?)",
            [(sha256, judgement.id) for _, judgement in kept],
        )


def _counts_text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing"
