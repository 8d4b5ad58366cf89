"""The lab itself: hosts are apart in network, disk and name, and nothing of it stays."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.lab


def reaches(lab: Any, source: int, target: int) -> bool:
    probe = (
        "import socket, sys; "
        f"socket.create_connection(({lab.address(target)!r}, 7000), timeout=1).close()"
    )
    return bool(lab.run(source, "python3", "-c", probe).returncode == 0)


def test_hosts_share_no_disk_and_can_be_cut_and_killed(make_lab: Any, tmp_path: Path) -> None:
    with make_lab(2) as lab:
        lab.run(1, "sh", "-c", "echo one > note")
        temporary = lab.run(1, "mktemp").stdout.strip()
        assert lab.run(1, "cat", "note", temporary).stdout == "one\n"
        assert lab.run(2, "test", "-e", "note").returncode == 1
        assert lab.run(2, "test", "-e", temporary).returncode == 1
        assert lab.run(2, "hostname").stdout == "host2\n"

        server = lab.start(2, "python3", "-m", "http.server", "7000", out=tmp_path / "log")
        deadline = time.monotonic() + 20
        while not reaches(lab, 1, 2):
            assert time.monotonic() < deadline
        lab.cut(2)
        assert not reaches(lab, 1, 2)
        lab.heal(2)
        assert reaches(lab, 1, 2)
        lab.kill(2)
        server.wait(5)
        assert lab.pids(2) == []
        disk, number = lab.disk(1), lab.number
    assert not disk.exists()
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert f"acclab{number}h" not in names.stdout
