"""Stores of torch.distributed that listen on one address: by themselves they listen on all."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist


def store_on(host: str, timeout: timedelta) -> Any:
    """A TCPStore (`port` is its free port) that this process keeps and waits for nobody."""
    listening = socket.create_server((host, 0))
    port = listening.getsockname()[1]
    return dist.TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timeout,
        master_listen_fd=listening.detach(),
    )


def gloo_on(host: str, timeout: timedelta) -> Any:
    """Options of a gloo process group that listens on ``host`` only; by itself it takes an address
    that the machine's name resolves to."""
    kind: Any = dist.ProcessGroupGloo
    options = kind._Options()
    options._timeout = timeout
    options._devices = [kind.create_device(hostname=host)]
    return options


def gloo_listens_on(host: str) -> None:
    """As ``gloo_on``, for all groups that this process makes from now on, those that torch makes
    by itself included. ``GLOO_SOCKET_IFNAME`` goes before it."""
    for interface, addresses in psutil.net_if_addrs().items():
        if any(one.address == host for one in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            return
