"""`accord preferences`: stores of judgements."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import Json, Overrides

preferences = typer.Typer(
    name="preferences",
    no_args_is_help=True,
    help="Import, export, check, snapshot and forget judgements.",
)
Store = Annotated[Path, typer.Argument(help="A preference store (*.db).")]
Split = Annotated[str, typer.Option(help="Split of a snapshot or data set.")]


@preferences.command("import")
def import_rows(
    rows: Annotated[
        str,
        typer.Argument(
            help="Judgements: JSONL, JSON, CSV, TSV or Parquet, a folder that `datasets` saved, or "
            "datasets:NAME. Shapes: TRL, HH-RLHF, verl, NeMo, UltraFeedback, Argilla, Label Studio."
        ),
    ],
    store: Annotated[
        Path, typer.Argument(help="A preference store (*.db). Made if it does not exist.")
    ],
    split: Split = "train",
    consent: Annotated[
        str, typer.Option(help="Terms the annotators agreed to, where a row does not say.")
    ] = "unknown",
    license_: Annotated[
        str, typer.Option("--license", help="License, where a row does not say.")
    ] = "unknown",
    skip_bad_rows: Annotated[
        bool,
        typer.Option(
            "--skip-bad-rows",
            help="Leave out and count bad rows, instead of stopping at the first.",
        ),
    ] = False,
) -> None:
    """Read judged completions into a store.

    All rows are imported, or none.

    Example: `accord preferences import pairs.jsonl preferences.db`
    """
    from cluster.assembly.preferences import open_store
    from cluster.runs.console import Reporter, result
    from reward_service.preferences.imports import add_preferences, read_preferences

    # Read first: a bad file leaves no new store behind.
    read = read_preferences(
        rows, split=split, consent=consent, license=license_, skip_bad=skip_bad_rows
    )
    if read.left_out.count:
        Reporter().say(str(read.left_out))
    done = add_preferences(open_store(store, must_exist=False), read)
    if done.forgotten:
        Reporter().say(
            f"left out {done.forgotten} items and labels that this store was told to forget"
        )
    result(json.dumps({"store": str(store), **asdict(done), "bad_rows": read.left_out.count}))


@preferences.command("export")
def export(
    store: Store,
    out: Annotated[Path, typer.Argument(help="*.jsonl or *.parquet to write.")],
    drop_annotators: Annotated[
        bool, typer.Option("--drop-annotators", help="Leave out who judged.")
    ] = False,
) -> None:
    """Write a store as prompt, chosen and rejected, as TRL reads.

    The command leaves out ties and pairs in which both completions are bad, and counts them.

    Example: `accord preferences export runs/q/preferences.db pairs.jsonl`
    """
    from cluster.assembly.preferences import open_store
    from cluster.runs.console import result
    from reward_service.preferences.export import export_preferences

    opened = open_store(store, must_exist=True)
    done = export_preferences(opened, out, drop_annotator=drop_annotators)
    result(json.dumps({"file": str(out), **asdict(done)}))


@preferences.command("stats")
def stats(store: Store) -> None:
    """Print counts and the quality of the judgements.

    The report covers agreement, control items, biases, speed, groups and drift.

    Example: `accord preferences stats runs/q/preferences.db`
    """
    from cluster.assembly.preferences import open_store, quality
    from cluster.runs.console import result

    opened = open_store(store, must_exist=True)
    found = {**opened.stats(), **quality(opened)}
    result(json.dumps(found, indent=2, ensure_ascii=False))


@preferences.command("choose")
def choose(
    completions: Annotated[
        str,
        typer.Argument(
            help="Several completions per prompt, as `accord generate --samples 4` writes them, in "
            "JSONL, JSON, CSV, TSV or Parquet."
        ),
    ],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSONL file to write.")] = Path(
        "items.jsonl"
    ),
    config: Annotated[
        Path | None, typer.Option(help="TOML file with the keys of the choice.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="A preference store (*.db), whose items are not asked again."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what is chosen at random.")] = 0,
    split: Split = "train",
) -> None:
    """Choose the pairs of completions that are worth a judgement.

    The file has one pair per row, the most wanted first. `accord label` and `accord ai-label` read
    it, and the preference store keeps why each pair was chosen.

    Example: `accord preferences choose completions.jsonl strategy=diversity count=200`

    Example: `accord preferences choose completions.jsonl --config examples/choice.toml`
    """
    from cluster.assembly.choosing import choice_told, chosen_items, write_items
    from cluster.assembly.preferences import open_store
    from cluster.contracts.config.choice import ChoiceConfig
    from cluster.contracts.config.file import load_config
    from cluster.runs.console import Reporter, result

    settings = load_config(ChoiceConfig, str(config) if config else None, overrides or [])
    known = open_store(store, must_exist=True).items() if store else []
    asked = {item.id for item in known}
    items = chosen_items(completions, settings, seed=seed, split=split, asked=asked)
    write_items(items, out)
    Reporter().say(choice_told(items))
    result(str(out))


@preferences.command("snapshot")
def snapshot(
    store: Store,
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with [snapshot] and [quality].")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the judgements into Parquet files that never change.

    If a quality gate of the config is not passed, the command writes nothing and exits with 1.

    Example: `accord preferences snapshot preferences.db labels-1 quality.min_alpha=0.4`
    """
    from cluster.assembly.preferences import open_store, take_snapshot
    from cluster.contracts.config.file import load_config
    from cluster.contracts.config.preferences import PreferencesConfig
    from cluster.runs.console import result
    from reward_service.preferences.gates import HeldBack, as_rows

    settings = load_config(PreferencesConfig, str(config) if config else None, overrides or [])
    try:
        done = take_snapshot(open_store(store, must_exist=True), out, settings)
    except HeldBack as held:
        if as_json:
            result(json.dumps({"snapshot": None, "gates": as_rows(held.gates)}))
        raise
    if as_json:
        result(json.dumps({"snapshot": str(done.path), **asdict(done)}, default=str))
    else:
        rows = ", ".join(f"{name} {count}" for name, count in done.counts.items())
        result(f"{done.path}  sha256 {done.sha256}\n{rows}")


@preferences.command("forget")
def forget_records(
    store: Store,
    annotator: Annotated[
        str, typer.Option(help="Pseudonym: everything this annotator judged.")
    ] = "",
    record: Annotated[str, typer.Option(help="Id of a judgement, or of an item.")] = "",
    prompt: Annotated[str, typer.Option(help="Text of a prompt, or its hash.")] = "",
    runs: Annotated[
        list[Path] | None,
        typer.Option(help="Folder with run directories, to name the models. Default: runs."),
    ] = None,
) -> None:
    """Delete an annotator, a record or a prompt for good.

    The command names the snapshots and models that had learnt from it. Delete these yourself.

    Example: `accord preferences forget preferences.db --annotator annotator-1f3c --runs runs`
    """
    from cluster.assembly.preferences import open_store
    from cluster.contracts.errors import UserError
    from cluster.runs.console import result
    from reward_service.preferences.forget import Kind, forget

    kinds: dict[Kind, str] = {"annotator": annotator, "record": record, "prompt": prompt}
    given = [(kind, which) for kind, which in kinds.items() if which]
    if len(given) != 1:
        raise UserError("give one of --annotator, --record, --prompt", where="command line")
    stone = forget(open_store(store, must_exist=True), *given[0], runs or [Path("runs")])
    result(json.dumps(asdict(stone), indent=2, ensure_ascii=False))


@preferences.command("audit")
def audit(
    store: Store,
    personal_data: Annotated[
        bool,
        typer.Option("--personal-data", help="Look for personal data as well, by patterns."),
    ] = False,
) -> None:
    """Check that a store and its snapshots are whole.

    The exit code is 1 if they are not.

    Example: `accord preferences audit preferences.db --personal-data`
    """
    from cluster.assembly.preferences import open_store
    from cluster.runs.console import result
    from reward_service.preferences.audit import audit_store
    from reward_service.preferences.personal_data import scan

    opened = open_store(store, must_exist=True)
    found = audit_store(opened)
    if personal_data:
        scanned = scan(opened.items(), opened.judgements(history=True))
        found["personal_data"] = [asdict(finding) for finding in scanned]
    result(json.dumps(found, indent=2, ensure_ascii=False))
    if found["problems"]:
        raise typer.Exit(1)


@preferences.command("duplicates")
def duplicates(
    store: Store,
    against: Annotated[
        list[str] | None,
        typer.Option(help="Rows with prompts for evaluation, which the store must not hold."),
    ] = None,
    split: Split = "train",
    threshold: Annotated[
        float, typer.Option(min=0.5, max=1.0, help="Similarity from which prompts are alike.")
    ] = 0.8,
) -> None:
    """Find duplicates, and prompts that are kept for evaluation.

    The exit code is 1 if prompts for evaluation are found.

    Example: `accord preferences duplicates preferences.db --against eval_prompts.jsonl`
    """
    from cluster.assembly.preferences import find_duplicates, open_store
    from cluster.runs.console import result

    opened = open_store(store, must_exist=True)
    found = find_duplicates(opened, against or [], split, threshold)
    result(json.dumps(found, indent=2, ensure_ascii=False))
    if any(found["leaks"].values()):
        raise typer.Exit(1)
