"""What Ray starts as a worker process, on a cluster that Accord has started.

With a fork server (`fork_server.py`) the worker is a copy of that process, whose imports are done.
This small process then only stands for it: it ends when the worker ends, and the worker ends with
it. Without a fork server, or where it is gone, this process becomes the worker itself.

Imports nothing heavy: the time until a worker serves begins here.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

PLACE = "ACCORD_FORK_SERVER"
"""The variable that names the fork server's socket."""


def forked(place: str, program: str, words: list[str]) -> int | None:
    """Have the fork server at ``place`` run a Python file with these arguments, in a new process
    that has this one's variables, folder and streams. Returns its exit code once it has ended; None
    where there is no server."""
    connection = ask_fork(place, program, words, [0, 1, 2], os.environ)
    if connection is None:
        return None
    with connection:
        try:
            return int.from_bytes(connection.recv(1), "big")  # when it has ended
        except OSError:  # the server is gone; its workers end by themselves
            return 1


def ask_fork(
    place: str, program: str, words: list[str], streams: list[int], environment: Mapping[str, str]
) -> socket.socket | None:
    """Have the fork server run a Python file in a new process with these standard streams. Returns
    the connection that stands for the process, once it is there: it tells the exit code, and the
    process ends when it is closed. None where there is no server."""
    import json
    import signal
    import socket

    request = {
        "program": program,
        "words": words,
        "environ": dict(environment),
        "cwd": os.getcwd(),
        "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
    }
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(place)
        socket.send_fds(connection, [b"\0"], streams)
        connection.sendall(json.dumps(request).encode() + b"\n")
        if connection.recv(1) == b"+":  # forked
            return connection
    except OSError:
        pass
    connection.close()
    return None


def default_worker() -> str:
    """The file that Ray runs in a worker process. Ray itself is not imported."""
    from importlib.util import find_spec

    ray = find_spec("ray")
    assert ray is not None  # else nobody had started this
    return os.path.join(
        os.path.dirname(str(ray.origin)), "_private", "workers", "default_worker.py"
    )


def become(path: str, words: list[str]) -> None:
    """Run a Python file as this process's program."""
    import runpy

    sys.argv = [path, *words]
    sys.path[0] = os.path.dirname(path)
    runpy.run_path(path, run_name="__main__")


def main() -> None:
    place, program, words = os.environ.get(PLACE), default_worker(), sys.argv[1:]
    code = forked(place, program, words) if place else None
    if code is not None:
        sys.exit(code)
    become(program, words)


if __name__ == "__main__":
    main()
