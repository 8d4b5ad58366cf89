"""`accord preferences`: stores of comparisons."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from cluster.assembly.preferences import open_store, statistics
from cluster.contracts.errors import UserError
from cluster.runs.console import result


def show_stats(path: Path) -> None:
    store = open_store(path, must_exist=True)
    result(json.dumps(statistics(store), indent=2, ensure_ascii=False))


def export(path: Path, out: Path) -> None:
    from reward_service.preferences.import_export import export_preferences

    done = export_preferences(open_store(path, must_exist=True), out)
    result(json.dumps({"file": str(out), **asdict(done)}))


def import_rows(rows: Path, path: Path) -> None:
    from reward_service.preferences.import_export import import_jsonl

    if not rows.is_file():
        raise UserError("no such file", where=str(rows), fix="give a JSONL file of comparisons")
    done = import_jsonl(open_store(path, must_exist=False), rows)
    result(json.dumps({"store": str(path), **asdict(done)}))
