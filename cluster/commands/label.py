"""`accord label`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import Overrides, complete_run

ROWS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz")


def label(
    config: Annotated[
        Path,
        typer.Argument(
            help="A preference store (*.db, made if it does not exist), or a TOML file.",
            metavar="CONFIG_OR_STORE",
        ),
    ],
    overrides: Overrides = None,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Sample new completions from this run's newest policy while people label.",
            autocompletion=complete_run,
        ),
    ] = None,
) -> None:
    """Let people compare, rank and edit completions in a browser.

    The command prints an invitation for an admin, which works once. The admin invites annotators.
    Labels go into the preference store. Ctrl-C ends the server; nothing that was submitted is lost.

    Example: `accord label preferences.db data.files=[completions.jsonl]`

    Example: `accord label examples/label.toml data.overlap=2`

    Example: `accord label preferences.db --policy runs/my-run`
    """
    import threading

    from cluster.assembly.labelling import open_label_site
    from cluster.contracts.config.file import load_config
    from cluster.contracts.config.label import LabelConfig
    from cluster.contracts.errors import UserError
    from cluster.pages.access import LOOPBACK
    from cluster.runs.console import Reporter, result

    words = [*(overrides or []), *([f"live.policy={policy}"] if policy else [])]
    if config.suffix in ROWS and config.is_file():
        raise UserError(
            "is a file of rows; `accord label` takes a preference store or a config",
            where=str(config),
            fix=f"to label its completions: accord label preferences.db data.files=[{config}]",
        )
    if config.suffix in (".db", ".sqlite"):
        settings = load_config(LabelConfig, None, [f"store={config}", *words])
    else:
        settings = load_config(LabelConfig, str(config), words)
    reporter = Reporter()
    site = open_label_site(settings, reporter.say)
    reporter.say("Open this address in a browser. It is an invitation for an admin and works once.")
    if settings.server.host not in LOOPBACK:
        reporter.say("Others in the network can read along; an SSH tunnel is safer.")
    result(site.invitation)
    try:
        threading.Event().wait()
    finally:
        site.stop()
