"""Preference stores, as several commands open, describe and use them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.contracts.config.preferences import PreferencesConfig, SnapshotConfig
from cluster.contracts.durable import write_json
from cluster.contracts.errors import UserError
from cluster.contracts.rows.folders import is_snapshot, read_snapshot
from cluster.contracts.rows.reader import read_rows
from cluster.contracts.rows.shapes import prompt_shape


def open_store(path: Path, *, must_exist: bool) -> Any:
    from reward_service.preferences.store import PreferenceStore

    if must_exist and not path.exists():
        raise UserError(
            "no such preference store", where=str(path), fix="make one: accord preferences import"
        )
    return PreferenceStore(path)


def statistics(store: Any) -> dict[str, Any]:
    """Counts, agreement between annotators and position bias, as one JSON-able dict."""
    from reward_service.preferences.agreement import agreement
    from reward_service.preferences.quality import position_bias

    judgements = store.judgements()
    return {
        **store.stats(),
        "agreement": dict(agreement(judgements)),
        "position_bias": asdict(position_bias(judgements)),
    }


def quality(store: Any) -> dict[str, Any]:
    """Everything that is known about a store's judgements, as one JSON-able dict."""
    from reward_service.preferences.people import People
    from reward_service.preferences.quality import quality_report

    teams = {annotator.id: annotator.team for annotator in People(store).annotators()}
    return quality_report(store.judged(), teams)


def take_snapshot(store: Any, out: Path, config: PreferencesConfig) -> Any:
    """Write a snapshot if the quality gates let it through. Raises HeldBack if they do not."""
    from reward_service.preferences.gates import HeldBack, as_rows, gates_of
    from reward_service.preferences.quality import numbered
    from reward_service.preferences.snapshot import write_snapshot

    report = quality(store)
    labels = sum(judgement.is_label for judgement in store.judgements())
    gates = gates_of(config.quality, report, labels)
    if not all(gate.passed for gate in gates):
        raise HeldBack(gates)
    return write_snapshot(store, out, config.snapshot, as_rows(gates), numbered(report))


LABELS = "labels.json"  # of a run: what it knows of the labels it learnt from


def training_data(path: str, folder: Path) -> tuple[str, str | None]:
    """Where a run reads its rows, and the hash of the snapshot that they are (None: another file).

    Of a preference store, a snapshot with all its prompts in one split is written into ``folder``,
    the run's own, unless the run has one already. What is known of a snapshot's labels is copied
    into the run, for its report.
    """
    if path.endswith(".db"):
        target = folder / "snapshot"
        if not target.exists():
            store = open_store(Path(path), must_exist=True)
            all_in_one = SnapshotConfig(test_fraction=0.0)
            take_snapshot(store, target, PreferencesConfig(snapshot=all_in_one))
        path = str(target)
    if not is_snapshot(Path(path)):
        return path, None
    manifest = read_snapshot(Path(path))
    write_json(folder / LABELS, {k: v for k, v in manifest.items() if k not in ("files", "schema")})
    return path, str(manifest["sha256"])


def find_duplicates(
    store: Any, against: Sequence[str], split: str, threshold: float
) -> dict[str, Any]:
    """``items`` that are there twice; ``prompts`` that are nearly the same; and for each file of
    ``against`` the prompts of the store that stand in it, too (``leaks``)."""
    from reward_service.preferences.duplicates import near_duplicates, prompt_text, same_items
    from reward_service.preferences.records import prompt_hash

    items = store.items()
    texts = {prompt_hash(item.messages): prompt_text(item.messages) for item in items}
    leaks = {}
    for file in against:
        read = read_rows(file, split, lambda place, row: (place.where, prompt_shape(row).messages))
        others = {where: prompt_text(messages) for where, messages in read.items}
        found = near_duplicates(texts, threshold, others)
        leaks[file] = [_shown(pair, texts) for pair in found]
    return {
        "items": [list(ids) for ids in same_items(items)],
        "prompts": [_shown(pair, texts) for pair in near_duplicates(texts, threshold)],
        "leaks": leaks,
    }


def _shown(pair: Any, texts: dict[str, str]) -> dict[str, Any]:
    return {**asdict(pair), "similarity": round(pair.similarity, 3), "text": texts[pair.first][:80]}
