"""`accord preferences`: stores of comparisons."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.contracts.errors import UserError
from cluster.progress import result


def open_store(path: Path, *, must_exist: bool) -> Any:
    from reward_service.preferences.store import PreferenceStore

    if must_exist and not path.is_file():
        raise UserError(
            "no such preference store", where=str(path), fix="make one: accord preferences import"
        )
    return PreferenceStore(path)


def statistics(store: Any) -> dict[str, Any]:
    """Counts, agreement between annotators and position bias, as one JSON-able dict."""
    from reward_service.preferences.quality import agreement, position_bias

    labels = store.labels()
    return {
        **store.stats(),
        "agreement": dict(agreement(labels)),
        "position_bias": asdict(position_bias(labels)),
    }


def show_stats(path: Path) -> None:
    store = open_store(path, must_exist=True)
    result(json.dumps(statistics(store), indent=2, ensure_ascii=False))


def export(path: Path, out: Path) -> None:
    from reward_service.preferences.exchange import export_preferences

    done = export_preferences(open_store(path, must_exist=True), out)
    result(json.dumps({"file": str(out), **asdict(done)}))


def import_rows(rows: Path, path: Path) -> None:
    from reward_service.preferences.exchange import import_jsonl

    if not rows.is_file():
        raise UserError("no such file", where=str(rows), fix="give a JSONL file of comparisons")
    done = import_jsonl(open_store(path, must_exist=False), rows)
    result(json.dumps({"store": str(path), **asdict(done)}))
