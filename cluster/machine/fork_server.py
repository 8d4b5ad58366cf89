"""A process that imports large libraries once, and then becomes any number of Ray workers by
forking.

vLLM, torch and transformers take seconds of a core to import. A worker that is forked from a
process that has them starts at once, and shares their memory. The imports begin with the command,
beside the start of Ray. For CPUs only: a CUDA context does not survive a fork.

Ray starts `ray_worker.py`, which asks here; the worker is a child of this process, and has the
arguments, variables, folder and standard streams that Ray has given to the one that asks.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.machine.imports import hidden, quick_imports
from cluster.machine.ray_worker import PLACE, become

ROOT = Path(__file__).resolve().parents[2]
BACKLOG = 256
REQUEST_S = 10.0  # for a worker's words to arrive once it has connected


@contextmanager
def fork_server(modules: Sequence[str], variables: Mapping[str, str]) -> Iterator[None]:
    """Ray workers of clusters that this process starts within are forked from one process, which
    has imported ``modules`` with ``variables`` in its environment.

    It begins to import now. Workers that are asked for meanwhile wait. On other systems than Linux
    workers import for themselves.
    """
    if not _can_fork() or PLACE in os.environ:
        yield
        return
    folder = tempfile.mkdtemp(prefix="accord-")  # mode 0700: who can connect can run code
    place = os.path.join(folder, "fork-server")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(place)
    listening.listen(BACKLOG)
    command = [sys.executable, "-m", "cluster.machine.fork_server", str(listening.fileno())]
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    process = subprocess.Popen(
        [*command, *modules],
        stdin=subprocess.PIPE,  # closed when this process ends, however it ends
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # what libraries say when they are imported; workers have a log
        pass_fds=[listening.fileno()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables},
        start_new_session=True,  # a Ctrl-C is for the command
    )
    listening.close()
    os.environ[PLACE] = place
    try:
        yield
    finally:
        os.environ.pop(PLACE, None)
        assert process.stdin is not None
        process.stdin.close()
        process.kill()  # it may still import; its workers have ended with their cluster
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _can_fork() -> bool:
    """Linux from 5.3 on, in a container that lets us wait for processes by descriptor."""
    if sys.platform != "linux":
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


# -- in the process itself -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """What a worker is to become, and the connection that tells its end."""

    connection: socket.socket
    streams: Sequence[int]
    words: Mapping[str, Any]


class Server:
    """Forks workers until its parent ends. ``serve`` returns in each of them, with its request."""

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening
        self._waits = selectors.DefaultSelector()
        self._waits.register(listening, selectors.EVENT_READ)
        self._waits.register(sys.stdin.fileno(), selectors.EVENT_READ)
        self._workers: dict[int, tuple[int, socket.socket]] = {}  # pidfd -> (pid, connection)
        self._pidfds: dict[socket.socket, int] = {}

    def serve(self) -> Request | None:
        """What this process, a new one, is to become; None when the parent has ended."""
        while True:
            for key, _ in self._waits.select():
                if key.fileobj is self._listening:
                    connection, _ = self._listening.accept()
                    request = _received(connection)
                    if request is None:
                        connection.close()
                    elif self._fork(request):
                        return request
                elif key.fd == sys.stdin.fileno():
                    return None
                elif key.fd in self._workers:
                    self._ended(key.fd)
                elif key.fileobj in self._pidfds:  # nobody stands for the worker any more
                    _kill(self._workers[self._pidfds[key.fileobj]][0])

    def _fork(self, request: Request) -> bool:
        """Whether this is the new process."""
        pid = os.fork()
        if pid == 0:
            self._waits.close()
            self._listening.close()
            return True
        for stream in request.streams:
            os.close(stream)
        pidfd = os.pidfd_open(pid)
        self._workers[pidfd] = (pid, request.connection)
        self._pidfds[request.connection] = pidfd
        for waited in (pidfd, request.connection):
            self._waits.register(waited, selectors.EVENT_READ)
        with suppress(OSError):
            request.connection.sendall(b"+")
        return False

    def _ended(self, pidfd: int) -> None:
        pid, connection = self._workers.pop(pidfd)
        del self._pidfds[connection]
        for waited in (pidfd, connection):
            self._waits.unregister(waited)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        with suppress(OSError), connection:
            connection.sendall(bytes([code if code >= 0 else 128 - code]))
        os.close(pidfd)
        with suppress(ProcessLookupError):  # what it had started itself
            os.killpg(pid, signal.SIGKILL)


def _received(connection: socket.socket) -> Request | None:
    """None for one that has gone away meanwhile."""
    connection.settimeout(REQUEST_S)
    try:
        _, streams, _, _ = socket.recv_fds(connection, 1, 3)
        with connection.makefile("rb") as reader:
            words = json.loads(reader.readline())
    except (OSError, ValueError):
        return None
    connection.settimeout(None)
    return Request(connection, streams, words)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _take_over(request: Request) -> None:
    """As if Ray had started this process."""
    os.setsid()  # a signal to its group must reach no other worker
    for number, stream in enumerate(request.streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request.words["cwd"])
    os.environ.clear()
    os.environ.update(request.words["environ"])
    signal.pthread_sigmask(signal.SIG_SETMASK, request.words["blocked"])
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


def _prepare(modules: Sequence[str]) -> None:
    """Ray is left to the workers: it reads its variables when it is imported, and they have their
    own. vLLM, which would import it for engines over several machines, does without."""
    with hidden("ray"), quick_imports(scipy=False) if modules else nullcontext():
        for module in modules:
            with suppress(Exception):  # the worker that needs it says what is wrong
                importlib.import_module(module)
    gc.freeze()  # else the first collection in a worker would copy all of it


def main() -> None:
    listening = socket.socket(fileno=int(sys.argv[1]))
    _prepare(sys.argv[2:])
    request = Server(listening).serve()
    if request is None:
        # A parent that was killed has left its folder.
        shutil.rmtree(os.path.dirname(listening.getsockname()), ignore_errors=True)
        return
    _take_over(request)
    become(request.words["program"], request.words["words"])


if __name__ == "__main__":
    main()
