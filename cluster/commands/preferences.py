"""`accord preferences`: stores of comparisons."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

preferences = typer.Typer(
    name="preferences",
    no_args_is_help=True,
    help="Import, export and inspect comparisons of completions.",
)
Store = Annotated[Path, typer.Argument(help="A preference store (*.db).")]


@preferences.command("stats")
def stats(store: Store) -> None:
    """Print counts, agreement of annotators and position bias.

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
    """Write a store as prompt/chosen/rejected rows.

    The command leaves out ties and pairs in which both completions are bad, and counts them.

    Example: `accord preferences export runs/q/preferences.db pairs.jsonl`
    """
    from cluster.assembly.preferences import open_store
    from cluster.runs.console import result
    from reward_service.preferences.export import export_preferences

    done = export_preferences(open_store(store, must_exist=True), out)
    result(json.dumps({"file": str(out), **asdict(done)}))


@preferences.command("import")
def import_rows(
    rows: Annotated[
        str,
        typer.Argument(help="Comparisons: JSONL, JSON, CSV, TSV or Parquet, or datasets:NAME."),
    ],
    store: Annotated[
        Path, typer.Argument(help="A preference store (*.db). Made if it does not exist.")
    ],
    skip_bad_rows: Annotated[
        bool,
        typer.Option(
            "--skip-bad-rows",
            help="Leave out and count bad rows, instead of stopping at the first.",
        ),
    ] = False,
) -> None:
    """Read prompt/chosen/rejected rows into a store.

    Example: `accord preferences import pairs.jsonl preferences.db`
    """
    from cluster.assembly.preferences import open_store
    from cluster.runs.console import Reporter, result
    from reward_service.preferences.imports import add_preferences, read_preferences

    # Read first: a bad file leaves no new store behind.
    read = read_preferences(rows, skip_bad=skip_bad_rows)
    if read.left_out.count:
        Reporter().say(str(read.left_out))
    done = add_preferences(open_store(store, must_exist=False), read)
    result(json.dumps({"store": str(store), **asdict(done), "bad_rows": read.left_out.count}))
