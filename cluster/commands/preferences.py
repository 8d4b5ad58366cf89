"""`accord preferences`: stores of comparisons."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cluster.contracts.errors import UserError

preferences = typer.Typer(
    name="preferences",
    no_args_is_help=True,
    help="Import, export and inspect comparisons of completions.",
)
Store = Annotated[Path, typer.Argument(help="A preference store (*.db).")]


@preferences.command("stats")
def stats(store: Store) -> None:
    """Print a store's counts, agreement between annotators, and position bias.

    Example: `accord preferences stats runs/q/preferences.db`
    """
    from cluster.assembly.preferences import open_store, statistics
    from cluster.runs.console import result

    opened = open_store(store, must_exist=True)
    result(json.dumps(statistics(opened), indent=2, ensure_ascii=False))


@preferences.command("export")
def export(
    store: Store,
    out: Annotated[Path, typer.Argument(help="*.jsonl or *.parquet to write.")],
) -> None:
    """Write a store as prompt/chosen/rejected rows. Ties and both-bad are left out and counted.

    Example: `accord preferences export runs/q/preferences.db pairs.jsonl`
    """
    from cluster.assembly.preferences import open_store
    from cluster.runs.console import result
    from reward_service.preferences.import_export import export_preferences

    done = export_preferences(open_store(store, must_exist=True), out)
    result(json.dumps({"file": str(out), **asdict(done)}))


@preferences.command("import")
def import_rows(
    rows: Annotated[Path, typer.Argument(help="prompt/chosen/rejected as JSONL.")],
    store: Annotated[
        Path, typer.Argument(help="A preference store (*.db). Made if it does not exist.")
    ],
) -> None:
    """Read prompt/chosen/rejected rows into a store.

    Example: `accord preferences import pairs.jsonl preferences.db`
    """
    from cluster.assembly.preferences import open_store
    from cluster.runs.console import result
    from reward_service.preferences.import_export import import_jsonl

    if not rows.is_file():
        raise UserError("no such file", where=str(rows), fix="give a JSONL file of comparisons")
    done = import_jsonl(open_store(store, must_exist=False), rows)
    result(json.dumps({"store": str(store), **asdict(done)}))
