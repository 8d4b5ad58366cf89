"""`accord ui`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import complete_run

PORT = 8270


def ui(
    place: Annotated[
        Path,
        typer.Argument(
            help="A run directory, or the folder that holds them.",
            metavar="RUN_OR_DIR",
            autocompletion=complete_run,
        ),
    ] = Path("runs"),
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. Others than the loopback address are reached from the "
            "network, without encryption."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = PORT,
) -> None:
    """Show runs in a browser, also while they go on.

    The pages show curves, workers, completions, events and comparisons. The command prints an
    address with a token in it. Without the token nothing is shown. Ctrl-C ends the server.

    Example: `accord ui`

    Example: `accord ui runs/my-run --port 0`
    """
    import threading

    from cluster.pages.access import LOOPBACK, Access, names_of
    from cluster.pages.library import library_of
    from cluster.pages.server import PageServer
    from cluster.pages.ui import ui_app
    from cluster.runs.console import Reporter, result

    library = library_of(place)
    server = PageServer(ui_app(library), Access(hosts=names_of(host)), host, port)
    reporter = Reporter()
    reporter.say("Open this address in a browser; Ctrl-C ends the server.")
    if host not in LOOPBACK:
        reporter.say("Others in the network can read along; an SSH tunnel is safer.")
    result(server.url_with_token)
    try:
        threading.Event().wait()
    finally:
        server.stop()
