"""An object in a process of its own on this machine, whose methods are called from here.

Commands that sample on one machine need no more than this of Ray, whose start takes seconds. Within
`fork_server` the process is a copy of that server, so its imports are done; elsewhere it is new.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cluster.contracts.errors import AccordError, Unexpected, WorkerDied
from cluster.machine.ray_worker import PLACE, ask_fork

ROOT = Path(__file__).resolve().parents[2]
PR_SET_NAME = 15  # <linux/prctl.h>
THREADS = 8  # calls that the object answers at the same time
SAID_BYTES = 2000  # of the process's last words
END_S = 3.0  # for the process to end by itself


class LocalProcess:
    """``make(*words)`` is called in the new process and makes the object. Raises nothing: what goes
    wrong is told by the calls.

    Function, words, answers and exceptions are pickled. The process ends with ``end``, and with
    this process, however that ends.
    """

    def __init__(self, name: str, make: Callable[..., Any], *words: Any) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (until nobody asks what it said)
        self._numbers = itertools.count()
        self._sending = threading.Lock()
        self._waiting: dict[int, Future[Any]] = {}
        self._there = threading.Event()
        self._over = False
        self._ours, theirs = socket.socketpair()
        self._connection = Connection(os.dup(self._ours.fileno()))
        self._connection.send((name, make, words))  # is read once the process is there
        self._thread = threading.Thread(target=self._run, args=(theirs,), name=name, daemon=True)
        self._thread.start()

    async def call(self, method: str, *words: Any) -> Any:
        """What the method returns or raises. Raises WorkerDied where the process is gone, and
        Unexpected for what is no AccordError."""
        answer: Future[Any] = Future()
        number = next(self._numbers)
        with self._sending:
            if self._over:
                raise WorkerDied(self._last_words())
            self._waiting[number] = answer
            with suppress(OSError):  # it has ended: who waits is told
                self._connection.send((number, method, words))
        return await asyncio.wrap_future(answer)

    def end(self) -> None:
        """The process has gone when this returns, or is on its way while it was still starting."""
        self._over = True
        with suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)
        if self._there.is_set():
            self._thread.join(2 * END_S)

    def _run(self, theirs: socket.socket) -> None:
        """The thread that starts the process, takes its answers, and sees it off."""
        # Asking the fork server waits for its imports: seconds.
        with theirs:
            stands, process = self._start(theirs)
        self._there.set()
        self._receive()
        with self._sending:
            self._over = True
            left, self._waiting = self._waiting, {}
        for answer in left.values():
            if answer.set_running_or_notify_cancel():
                answer.set_exception(WorkerDied(self._last_words()))
        if stands is not None:
            with suppress(OSError), stands:  # closed, it has the fork server kill the process
                stands.settimeout(END_S)
                stands.recv(1)  # the exit code
        if process is not None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
            process.kill()
            process.wait()

    def _receive(self) -> None:
        with suppress(EOFError, OSError), self._connection:
            while True:
                number, good, value = self._connection.recv()
                answer = self._waiting.pop(number)
                if not answer.set_running_or_notify_cancel():
                    continue  # nobody waits any more
                if good:
                    answer.set_result(value)
                else:
                    answer.set_exception(value)

    def _start(
        self, theirs: socket.socket
    ) -> tuple[socket.socket | None, subprocess.Popen[bytes] | None]:
        """The process, whose standard input is the connection: forked (then: the socket that stands
        for it) or new."""
        # Spinning OpenMP threads of several processes on shared cores cost a factor of ten.
        log, environment = self._log.fileno(), {"OMP_NUM_THREADS": "1", **os.environ}
        place = environment.pop(PLACE, None)
        if place is not None:
            streams = [theirs.fileno(), log, log]
            stands = ask_fork(place, str(Path(__file__)), [], streams, environment)
            if stands is not None or self._over:
                return stands, None
        paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        return None, subprocess.Popen(
            [sys.executable, "-m", "cluster.machine.local_process"],
            stdin=theirs.fileno(), stdout=log, stderr=log,
            env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # a Ctrl-C is for the command
        )  # fmt: skip

    def _last_words(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        said = os.pread(self._log.fileno(), SAID_BYTES, max(0, size - SAID_BYTES))
        lines = [line for line in said.decode("utf-8", "replace").splitlines() if line.strip()]
        return f"{self.name} is lost: its process has ended" + (f" ({lines[-1]})" if lines else "")


# -- in the process itself -------------------------------------------------------------------------


def main() -> None:
    """Answers calls until the other side has gone."""
    connection = Connection(os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sending = threading.Lock()

    def answer(number: int, method: str, words: tuple[Any, ...]) -> None:
        try:
            found = number, True, getattr(target, method)(*words)
        except BaseException as problem:
            found = number, False, _told(problem)
        with sending, suppress(OSError):  # nobody is there any more: `main` ends the process
            connection.send(found)

    with suppress(EOFError, OSError):
        name, make, given = connection.recv()
        _call_yourself(name)
        target = make(*given)
        threads = ThreadPoolExecutor(THREADS)
        while True:
            threads.submit(answer, *connection.recv())
    os._exit(0)  # its threads may be in the middle of anything


def _call_yourself(name: str) -> None:
    """For `ps` and `top`; a process that was forked would have the fork server's name."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_NAME, f"accord:{name}"[:15].encode(), 0, 0, 0)


def _told(problem: BaseException) -> AccordError:
    if isinstance(problem, AccordError):
        return problem
    import traceback

    traceback.print_exception(problem)  # into the log
    return Unexpected(f"{type(problem).__name__}: {problem}")


if __name__ == "__main__":
    main()
