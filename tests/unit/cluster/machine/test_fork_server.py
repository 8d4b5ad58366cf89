"""The process that becomes workers by forking: what a worker gets, and what ends with what."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.machine.fork_server import fork_server
from cluster.machine.ray_worker import PLACE, default_worker, forked

ROOT = Path(__file__).resolve().parents[4]
PATIENCE_S = 60.0

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there are forks on Linux only")


@pytest.fixture
def place() -> Iterator[str]:
    with fork_server((), {"FROM_THE_SERVER": "1"}):
        yield os.environ[PLACE]


def program(folder: Path, text: str) -> str:
    path = folder / "program.py"
    path.write_text(text, "utf-8")
    return str(path)


def asks(place: str, path: str, *words: str, **more: str) -> subprocess.Popen[str]:
    """A process that has the server run a program, as Ray's would."""
    code = f"import sys; from cluster.machine.ray_worker import forked; sys.exit(forked({place!r}, {path!r}, sys.argv[1:]))"  # noqa: E501
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        cwd=Path(path).parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), **more},
        stdout=subprocess.PIPE,
        text=True,
    )


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_worker_is_what_its_own_process_would_have_been(place: str, tmp_path: Path) -> None:
    path = program(
        tmp_path,
        "import os, sys\n"
        "print(__name__, sys.argv[1:], os.getcwd(), os.environ['OWN'])\n"
        "print('FROM_THE_SERVER' in os.environ, os.getpgrp() == os.getpid())\n"
        "sys.exit(7)\n",
    )
    worker = asks(place, path, "--id=3", OWN="mine")
    told = worker.communicate(timeout=PATIENCE_S)[0].splitlines()
    assert told == [f"__main__ ['--id=3'] {tmp_path} mine", "False True"]
    assert worker.returncode == 7


def test_two_workers_do_not_draw_the_same_random_numbers(place: str, tmp_path: Path) -> None:
    path = program(tmp_path, "import random; print(random.random())")
    drawn = {asks(place, path).communicate(timeout=PATIENCE_S)[0] for _ in range(2)}
    assert len(drawn) == 2


def test_a_worker_ends_with_the_process_that_stands_for_it(place: str, tmp_path: Path) -> None:
    """Ray kills a worker that does not register in time by the process it has started."""
    path = program(
        tmp_path,
        "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(600)\n",
    )
    asking, noted = asks(place, path), tmp_path / "pid"
    until(lambda: noted.is_file() and noted.read_text() != "")
    pid = int(noted.read_text())
    asking.kill()
    asking.communicate(timeout=PATIENCE_S)
    until(lambda: not psutil.pid_exists(pid))


def test_the_end_of_a_worker_ends_what_it_has_started(place: str, tmp_path: Path) -> None:
    path = program(
        tmp_path,
        "import subprocess, os\nprint(subprocess.Popen(['sleep', '600']).pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n",
    )
    worker = asks(place, path)
    assert worker.stdout is not None
    pid = int(worker.stdout.readline())
    worker.wait(PATIENCE_S)
    assert worker.returncode == 128 + 9
    until(lambda: not psutil.pid_exists(pid))


def test_a_server_whose_parent_was_killed_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import os, time; from cluster.machine.fork_server import fork_server\n"
        "with fork_server((), {}):\n"
        "    print(os.environ['ACCORD_FORK_SERVER'], flush=True)\n"
        "    time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    place = Path(parent.stdout.readline().strip())
    server = psutil.Process(parent.pid).children()
    parent.kill()
    parent.communicate(timeout=PATIENCE_S)
    until(lambda: not place.parent.exists() and not any(map(psutil.Process.is_running, server)))


def test_without_a_server_the_process_is_told_so(tmp_path: Path) -> None:
    with fork_server((), {}):
        place = os.environ[PLACE]
    assert PLACE not in os.environ
    assert not Path(place).parent.exists()
    assert forked(place, program(tmp_path, "print(1)"), []) is None


def test_a_module_that_cannot_be_imported_is_left_to_the_worker(tmp_path: Path) -> None:
    with fork_server(("no_such_module",), {}):
        path = program(tmp_path, "import no_such_module")
        assert asks(os.environ[PLACE], path).wait(PATIENCE_S) == 1


def test_within_a_server_there_is_no_second_one(place: str) -> None:
    with fork_server((), {}):
        assert os.environ[PLACE] == place
    assert os.environ[PLACE] == place


def test_the_file_that_ray_runs_is_there() -> None:
    assert Path(default_worker()).is_file()
