"""`accord dashboard`: Accord in Ray's dashboard and in Grafana."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

dashboard = typer.Typer(
    name="dashboard",
    no_args_is_help=True,
    help="Show runs in Ray's dashboard or in Grafana.",
)
Folder = Annotated[
    Path | None,
    typer.Argument(
        help="Folder with the dashboards that Ray's head wrote. Without it: that of the newest "
        "session on this machine.",
        metavar="FOLDER",
    ),
]


@dashboard.command("env")
def env(
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of the page: `cluster.page_port` of runs.")
    ] = 8266,
) -> None:
    """Print what Ray's head needs to show runs that join it.

    The command prints lines for the environment of the head.

    Run it on the head's machine before `ray start`. Runs that this user starts on that machine
    then serve their page at the printed address. The token in it is kept in
    `~/.accord/dashboard_token`.

    Example: `accord dashboard env`, as in `eval "$(accord dashboard env)" && ray start --head`
    """
    import shlex

    from cluster.assembly.ray_dashboard import exports
    from cluster.runs.console import result

    for name, value in exports(port).items():
        result(f"export {name}={shlex.quote(value)}")


@dashboard.command("install")
def install(folder: Folder = None) -> None:
    """Add Accord's panels to Ray's Grafana dashboard.

    The command appends rows to Ray's default dashboard, which Ray's Metrics tab shows, and writes
    a dashboard of Accord's own beside it. A Grafana that reads the folder shows both within
    seconds. It may be run again.

    Example: `accord dashboard install`
    """
    from cluster.machine.ray_folders import grafana_folder
    from cluster.runs.console import result
    from cluster.runs.grafana import install

    for path in install(folder or grafana_folder()):
        result(f"written: {path}")


@dashboard.command("remove")
def remove(folder: Folder = None) -> None:
    """Take Accord's panels out of it again.

    Example: `accord dashboard remove`
    """
    from cluster.machine.ray_folders import grafana_folder
    from cluster.runs.console import result
    from cluster.runs.grafana import uninstall

    for path in uninstall(folder or grafana_folder()):
        result(f"{'changed' if path.exists() else 'removed'}: {path}")
