"""Start or join the Ray cluster."""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from ipaddress import ip_address
from pathlib import PurePath
from typing import Any

import psutil

from cluster.contracts.config.base import ClusterConfig
from cluster.contracts.errors import UserError
from cluster.contracts.telemetry import telemetry_off
from cluster.machine.handshake import PACKAGES, ROOT, require_same_everywhere
from cluster.machine.head_node import head_node
from cluster.machine.joining import cluster_to_join
from cluster.machine.program_end import end_without_destructors
from cluster.machine.ray_token import prepare_token
from cluster.machine.signals import signal_handlers_kept

PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
LEFTOVERS_S = 2.0

_held: list[dict[str, Any]] = []
"""What the ``ray_cluster`` that this process is in yields; empty outside of one."""

_clusters = itertools.count(1)
"""Which of this process's Ray clusters the next one is."""


def in_ray_cluster() -> bool:
    """Whether this process is within a ``ray_cluster``."""
    return bool(_held)


@contextmanager
def ray_cluster(config: ClusterConfig) -> Iterator[dict[str, Any]]:
    """Ray for the length of a command. Yields {"address", "metrics_port", "dashboard", "job",
    "session", "resources", "started", "software"}; resources: "CPU" and "GPU" of the whole cluster;
    software: what every host has to run, None where there is only this one.

    A cluster started here listens on loopback only, asks for Ray's token, and is shut down at the
    end; one that was joined is left running. Within another ``ray_cluster`` of this process it is
    that one's cluster, whatever ``config`` says, so that commands in a row start Ray once. Raises
    UserError for one whose hosts run other software.
    """
    if _held:
        yield dict(_held[-1])
        return
    _environment()
    started = config.to_join is None
    if started:
        prepare_token()
    if next(_clusters) == 2:
        # Ray stops its exporter of metrics only the first time. The next one goes on exporting, in
        # vain, until the process ends, and then crashes it if it writes a warning just there.
        end_without_destructors()
    with _leftovers_ended() if started else nullcontext(), _joined(config) as info:
        software = None if started else require_same_everywhere()
        _held.append(info | {"started": started, "software": software})
        try:
            yield dict(_held[-1])
        finally:
            _held.pop()


@contextmanager
def _joined(config: ClusterConfig) -> Iterator[dict[str, Any]]:
    import ray

    if ray.is_initialized():
        raise UserError(
            "Ray is already running in this process",
            where="cluster.address",
            fix="call ray.shutdown() first; Accord starts or joins Ray itself",
        )
    # A line at every start, about what nobody has to decide: its token stays on.
    token_log = "ray._private.authentication.authentication_token_setup"
    logging.getLogger(token_log).setLevel(logging.ERROR)
    connected = _connected_to_own(config) if config.to_join is None else _connected(config.to_join)
    with connected as (context, dashboard):
        node: dict[str, Any] = next((n for n in ray.nodes() if n.get("Alive")), {})
        yield {
            "address": context.address_info.get("gcs_address", ""),
            "metrics_port": node.get("MetricsExportPort"),
            "dashboard": dashboard,
            "job": ray.get_runtime_context().get_job_id(),
            "session": PurePath(str(context.address_info.get("session_dir", ""))).name,
            "resources": {
                kind: amount
                for kind, amount in ray.cluster_resources().items()
                if kind in ("CPU", "GPU")
            },
        }


@contextmanager
def _connected_to_own(config: ClusterConfig) -> Iterator[tuple[Any, str | None]]:
    """(context, HOST:PORT of the dashboard) of a cluster that is started here, and ended."""
    with ExitStack() as ending:
        with _loopback():
            head = ending.enter_context(head_node(config))
            ending.callback(_shutdown)
            context = _init(head.address)
        yield context, head.dashboard


@contextmanager
def _connected(given: str) -> Iterator[tuple[Any, str | None]]:
    """(context, HOST:PORT of the dashboard) of a cluster that others have started."""
    # Its hosts import the driver's Accord, whatever they have of their own.
    code = {"py_modules": [str(ROOT / name) for name in PACKAGES], "excludes": ["__pycache__"]}
    place = cluster_to_join(given)
    with ExitStack() as ending:
        ending.callback(_shutdown)
        try:
            context = _init(place, runtime_env=code)
        except ConnectionError as problem:
            raise UserError(
                f"the Ray cluster answers, but cannot be joined: {problem}",
                where=f"cluster.address = {given}",
                fix="join from a machine that is one of its nodes: `ray start --address` makes "
                "it one",
            ) from None
        yield context, context.dashboard_url or None


def _init(address: str, **options: Any) -> Any:
    import ray

    with signal_handlers_kept():  # Ray puts one of its own for SIGTERM, with another exit code
        return ray.init(
            address=address,
            namespace="accord",
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
            **options,
        )


def _shutdown() -> None:
    import ray

    ray.shutdown()  # also what it had begun when it was interrupted


@contextmanager
def _loopback() -> Iterator[None]:
    """A cluster started within has the address 127.0.0.1, so that all its sockets do.

    `ray.init` turns any loopback address it is given into one that other machines reach, and then
    the ports of GCS, raylet, workers and metrics listen on every address of the machine. On the
    systems where Ray is not for clusters it stays on loopback, and this asks for the same here.
    """
    from ray._private import ray_constants, services

    kept = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        if not ip_address(services.get_node_ip_address()).is_loopback:
            raise RuntimeError(
                "this version of Ray would listen on every address of the machine: install the "
                "version that Accord's requirements name"
            )
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = kept


@contextmanager
def _leftovers_ended() -> Iterator[None]:
    """Processes started within, and theirs, are gone afterwards.

    Ray's own shutdown leaves its node agents to find out by themselves that their node has died;
    after an interrupted start that takes them many seconds.
    """
    before = set(_descendants())
    _adopt_orphans(True)
    try:
        yield
    finally:
        _, alive = psutil.wait_procs(set(_descendants()) - before, LEFTOVERS_S)
        # Looked for again: one may have been starting another.
        for process in {*alive, *_descendants()} - before:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        _adopt_orphans(False)


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _adopt_orphans(wanted: bool) -> None:
    """On Linux: a descendant whose parent dies becomes a child of this process (or no longer)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0)


def _environment() -> None:
    """For this process and, inherited, for every worker Ray starts."""
    telemetry_off()
    defaults = {
        "RAY_metrics_report_interval_ms": "2000",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TOKENIZERS_PARALLELISM": "false",
        # Workers may wait for a fork server that still imports.
        "RAY_worker_register_timeout_seconds": "300",
        # Spinning OpenMP threads of several roles on shared cores cost a factor of ten.
        "OMP_NUM_THREADS": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    if str(ROOT) not in paths:  # workers import our packages also where they are not installed
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *paths])
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
