"""What torch.distributed opens here can be reached through one address only."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from cluster.weights.stores import gloo_listens_on, gloo_on, store_on

WAIT = timedelta(seconds=20)


def listening() -> set[tuple[str, int]]:
    found = psutil.Process().net_connections("inet")
    return {
        (c.laddr.ip.removeprefix("::ffff:"), c.laddr.port)
        for c in found
        if c.status == psutil.CONN_LISTEN
    }


def test_a_store_listens_where_it_is_told_to() -> None:
    before = listening()
    store = store_on("127.0.0.1", WAIT)
    assert listening() - before == {("127.0.0.1", store.port)}
    store.set("a", "1")
    other: Any = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=WAIT)
    assert other.get("a") == b"1"


def test_gloo_takes_the_interface_of_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    gloo_listens_on("192.0.2.77")  # no address of this machine: left to gloo
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    gloo_listens_on("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"].startswith("lo")
    assert gloo_on("127.0.0.1", WAIT)._timeout == WAIT
