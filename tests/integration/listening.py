"""The sockets that a run listens on, and the table of SECURITY.md that names them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import psutil

TITLE = "## Listening sockets"


@dataclass(frozen=True)
class Listener:
    process: str
    address: str
    port: int

    @property
    def loopback(self) -> bool:
        found = ip_address(self.address)
        return (getattr(found, "ipv4_mapped", None) or found).is_loopback


@dataclass(frozen=True)
class Row:
    """A row of the table: processes by pattern, and whether their sockets stay on loopback."""

    pattern: str
    ports: tuple[int, ...]
    loopback: bool

    def allows(self, listener: Listener) -> bool:
        known = fnmatch.fnmatchcase(listener.process, self.pattern)
        port = not self.ports or listener.port in self.ports
        return known and port and (listener.loopback or not self.loopback)


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
    """`gcs_server`, `ray::RolloutActor`, or of a script its name: `launch.py`."""
    words = process.cmdline()
    first = Path(words[0]).name if words else process.name()
    if first.startswith("python"):
        return next((Path(word).name for word in words[1:] if word.endswith(".py")), first)
    return words[0].split(".", 1)[0] if words[0].startswith("ray::") else first


def rows_for_a_started_cluster(page: str) -> list[Row]:
    """The table under TITLE: `| process | ports | listens on | ... |`."""
    section = page.split(TITLE, 1)[1].split("\n## ", 1)[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("| `")
    ]
    return [
        Row(name, tuple(map(int, re.findall(r"\d+", ports))), where == "loopback")
        for process, ports, where, *_ in cells
        for name in re.findall(r"`([^`]+)`", process)
    ]
