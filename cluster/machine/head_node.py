"""The processes of a Ray cluster that Accord starts on this machine.

`ray.init` would also start Ray's autoscaler, its log monitor, and a web server that does nothing
without the dashboard, and wait for them: two seconds of a core before a worker can start. None of
them has anything to do here. The dashboard, where it is wanted, comes up beside the run.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.contracts.config.base import ClusterConfig

LOOPBACK = "127.0.0.1"
WORKER = Path(__file__).with_name("ray_worker.py")
DASHBOARD_PORTS = range(8265, 8315)  # Ray's own choice

log = logging.getLogger("accord.ray")


@dataclass(frozen=True, slots=True)
class HeadNode:
    """``address``: HOST:PORT of the head. ``dashboard``: HOST:PORT, where it will soon answer."""

    address: str
    dashboard: str | None


@contextmanager
def head_node(config: ClusterConfig) -> Iterator[HeadNode]:
    """A new cluster of one machine, whose processes are ended afterwards."""
    from ray._private.authentication.authentication_token_setup import enable_token_auth_by_default
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    class WithoutWebServer(Node):
        def start_api_server(self, **options: Any) -> None:
            """Started by `_serve_dashboard`, where it is wanted."""

    enable_token_auth_by_default()
    port = _free_port() if config.dashboard else None
    parameters: Any = RayParams(  # Ray's types of its parameters are wrong
        # Logical CPUs: the roles of a run need slots of their own even on two cores.
        num_cpus=config.num_cpus or max(8, os.cpu_count() or 1),
        object_store_memory=config.object_store_mb << 20,
        include_dashboard=False,
        dashboard_host=LOOPBACK,
        no_monitor=True,
        worker_path=str(WORKER),
    )
    parameters.dashboard_port, parameters.include_log_monitor = port, False
    node = WithoutWebServer(
        parameters, head=True, shutdown_at_exit=False, spawn_reaper=True, ray_init_cluster=True
    )
    over = threading.Event()
    if port is not None:
        target = (Node, node, over)
        threading.Thread(target=_serve_dashboard, args=target, daemon=True).start()
    try:
        yield HeadNode(node.address, None if port is None else f"{LOOPBACK}:{port}")
    finally:
        over.set()
        node.kill_all_processes(check_alive=False, allow_graceful=True)


def _serve_dashboard(kind: Any, node: Any, over: threading.Event) -> None:
    """Start Ray's dashboard. Its processes end with the thread that has started them, which
    therefore stays."""
    try:
        kind.start_api_server(node, include_dashboard=True, raise_on_failure=True)
    except Exception as problem:
        if not over.is_set():
            log.warning("Ray's dashboard could not be started: %s", problem)
    over.wait()


def _free_port() -> int:
    for port in DASHBOARD_PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return port
    return 0
