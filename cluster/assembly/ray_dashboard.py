"""The page of a run in Ray's dashboard: where it is served, and how Ray is told so.

Ray's head reads the addresses from its environment when it starts. On a cluster that Accord starts
this module sets them; for one that others start, `accord dashboard env` prints them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

from cluster.contracts.config.base import ClusterConfig
from cluster.contracts.errors import UserError
from cluster.machine.page_token import fixed_page_token, known_page_token
from cluster.pages.access import Access
from cluster.pages.ray_tab import OPEN_PATHS, LiveBoard, ray_tab
from cluster.pages.server import PageServer, listen

LOOPBACK = "127.0.0.1"
GRAFANA = "RAY_GRAFANA_HOST"
DASHBOARD_PORT = 8265


def exports(port: int) -> dict[str, str]:
    """What Ray's head needs in its environment to show the page of the runs that join it. The
    token in it is kept for this user, so that later runs serve at the same address."""
    return _environment(port, fixed_page_token())


def _environment(port: int, token: str) -> dict[str, str]:
    place = f"http://{LOOPBACK}:{port}"
    return {
        GRAFANA: place,  # asked by the head
        "RAY_GRAFANA_IFRAME_HOST": f"{place}/{token}",  # loaded by the browser
        "RAY_PROMETHEUS_HOST": place,
    }


@dataclass(slots=True)
class RayTab:
    """``listening``: the socket that the page will have; None where there will be no page."""

    access: Access | None = None
    listening: socket.socket | None = None
    server: PageServer | None = field(default=None)

    def serve(self, board: LiveBoard, dashboard: str | None) -> PageServer | None:
        """Show ``board`` from now on. ``dashboard``: HOST:PORT of Ray's dashboard, which alone may
        show the page in a frame."""
        if self.access is None or self.listening is None:
            return None
        access = Access(
            token=self.access.token,
            framed_by=_origins(dashboard, self.access.framed_by),
            open_paths=OPEN_PATHS,
        )
        port = self.listening.getsockname()[1]
        self.server = PageServer(ray_tab(board), access, LOOPBACK, port, self.listening)
        return self.server

    def close(self) -> None:
        if self.server is not None:
            self.server.stop()
        elif self.listening is not None:
            self.listening.close()


@contextmanager
def ray_tab_of(config: ClusterConfig) -> Iterator[RayTab]:
    """Within it Ray is started or joined. A Grafana of the user's (RAY_GRAFANA_HOST) is left alone:
    there is no page then."""
    if os.environ.get(GRAFANA) and config.to_join is None:
        yield RayTab()
        return
    if config.to_join is not None:
        tab = _joining(config)
    elif config.dashboard:
        tab = _starting(config)
    else:
        tab = RayTab()
    told: Mapping[str, str] = {}
    if config.to_join is None and tab.access is not None and tab.listening is not None:
        told = _environment(tab.listening.getsockname()[1], tab.access.token)
    os.environ.update(told)
    try:
        yield tab
    finally:
        for name in told:
            os.environ.pop(name, None)
        tab.close()


def _starting(config: ClusterConfig) -> RayTab:
    """At the usual port if it is free: Ray is told whichever it is."""
    with suppress(UserError):
        return RayTab(_access(config), listen(LOOPBACK, config.page_port))
    return RayTab(_access(config), listen(LOOPBACK, 0))


def _joining(config: ClusterConfig) -> RayTab:
    """At the port that the head was told, with the token that it was told, if somebody told it."""
    token = known_page_token()
    if token is None:
        return RayTab()
    with suppress(UserError):  # another run on this host has the page
        return RayTab(_access(config, token), listen(LOOPBACK, config.page_port))
    return RayTab()


def _access(config: ClusterConfig, token: str | None = None) -> Access:
    access = Access(framed_by=tuple(config.dashboard_origins))
    return access if token is None else replace(access, token=token)


def _origins(dashboard: str | None, more: tuple[str, ...]) -> tuple[str, ...]:
    """Where a browser shows the dashboard: at its own port, straight or through a tunnel."""
    host, _, port = (dashboard or f"{LOOPBACK}:{DASHBOARD_PORT}").rpartition(":")
    hosts = dict.fromkeys((host, LOOPBACK, "localhost"))
    return (*(f"http://{name}:{port}" for name in hosts), *more)
