"""The sockets that a run listens on, and the table of SECURITY.md that names them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import psutil

STARTED = "### On a cluster that Accord starts"
JOINED = "### On a cluster that you start"


@dataclass(frozen=True)
class Listener:
    process: str
    address: str
    port: int

    @property
    def host(self) -> IPv4Address | IPv6Address:
        found = ip_address(self.address)
        return getattr(found, "ipv4_mapped", None) or found


@dataclass(frozen=True)
class Row:
    """A row of a table: processes by pattern, their ports, and where they listen: "loopback", "its
    node" (the address by which the other hosts know it) or "any address"."""

    pattern: str
    ports: tuple[int, ...]
    where: str

    def allows(self, listener: Listener, node: str = "") -> bool:
        known = fnmatch.fnmatchcase(listener.process, self.pattern)
        port = not self.ports or listener.port in self.ports
        where = {
            "loopback": listener.host.is_loopback,
            "its node": listener.host.is_loopback or str(listener.host) == node,
            "any address": True,
        }
        return known and port and where[self.where]


def listeners_of(pid: int) -> list[Listener]:
    """Of a process and all it started."""
    root = psutil.Process(pid)
    return listeners_among([root.pid, *(child.pid for child in root.children(recursive=True))])


def listeners_among(pids: Iterable[int]) -> list[Listener]:
    found = []
    for pid in pids:
        try:
            process = psutil.Process(pid)
            title = _title(process)
            connections = process.net_connections("inet")
        except psutil.Error:  # it ended meanwhile
            continue
        found += [
            Listener(title, c.laddr.ip, c.laddr.port)
            for c in connections
            # A datagram socket has no state; one without a peer takes from everybody.
            if c.status == psutil.CONN_LISTEN or (c.status == psutil.CONN_NONE and not c.raddr)
        ]
    return found


def _title(process: psutil.Process) -> str:
    """`gcs_server`, `ray::RolloutActor`, or of a script its name: `launch.py`; of `python -m` its
    module."""
    words = process.cmdline()
    first = Path(words[0]).name if words else process.name()
    if first.startswith("python") and "-m" in words[:3]:
        return words[words.index("-m") + 1]
    if first.startswith("python"):
        return next((Path(word).name for word in words[1:] if word.endswith(".py")), first)
    return words[0].split(".", 1)[0] if words[0].startswith("ray::") else first


def rows_of(page: str, title: str) -> list[Row]:
    """The table under ``title``: `| process | ports | listens on | ... |`."""
    section = page.split(f"\n{title}\n", 1)[1].split("\n#", 1)[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("| `")
    ]
    return [
        Row(name, tuple(map(int, re.findall(r"\d+", ports))), where)
        for process, ports, where, *_ in cells
        for name in re.findall(r"`([^`]+)`", process)
    ]
