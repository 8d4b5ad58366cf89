"""Which models learnt from a snapshot: by the manifests of run directories."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MODELS = ("policy", "reward_model")  # of what a run produced, what others learn from


@dataclass(frozen=True, slots=True)
class _Record:
    """What a manifest says of a run: ``parents`` are paths, ``learnt`` hashes, ``made`` hashes."""

    parents: tuple[str, ...]
    learnt: frozenset[str]
    made: frozenset[str]


def models_trained_on(snapshots: Iterable[str], runs: Iterable[Path]) -> list[str]:
    """Run directories below ``runs`` that learnt from a snapshot with one of these hashes, and
    those that grew from such a run, and so on.

    A run grew from another if its manifest names a path in that run as a parent, or the hash of a
    model that the other produced. A run with a copy of such a model counts, too.
    """
    records = {
        path.parent.resolve(): record
        for folder in runs
        for path in sorted(folder.rglob("manifest.json"))
        if (record := _record(path)) is not None
    }
    wanted = set(snapshots)
    found = {run for run, record in records.items() if wanted & record.learnt}
    while True:
        made = {value for run in found for value in records[run].made}
        more = {
            run
            for run, record in records.items()
            if run not in found
            and (
                made & (record.learnt | record.made)
                or any(_run_of(parent, records) in found for parent in record.parents)
            )
        }
        if not more:
            return sorted(str(run) for run in found)
        found |= more


def _record(path: Path) -> _Record | None:
    """None for another file of this name, such as a checkpoint's."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not {"command", "parents"} & manifest.keys():
            return None
        hashes, outputs = _table(manifest, "parent_hashes"), _table(manifest, "outputs")
        return _Record(
            parents=tuple(str(p) for p in _table(manifest, "parents").values() if p),
            learnt=frozenset(map(str, filter(None, [manifest.get("snapshot"), *hashes.values()]))),
            made=frozenset(str(outputs[name]) for name in _MODELS if name in outputs),
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _table(manifest: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = manifest.get(key)
    return value if isinstance(value, dict) else {}


def _run_of(parent: str, runs: Mapping[Path, Any]) -> Path | None:
    """The innermost of the runs that holds the path."""
    try:
        path = Path(parent).resolve()
    except (OSError, ValueError):
        return None
    return next((place for place in (path, *path.parents) if place in runs), None)
