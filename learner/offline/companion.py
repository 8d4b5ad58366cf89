"""One more process of a fit: see `learner.offline.companions`.

python -m learner.offline.companion RANK SIZE PORT
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from cluster.contracts.errors import AccordError
from cluster.contracts.telemetry import telemetry_off
from cluster.machine.imports import quick_imports


def main(rank: int, size: int, port: int) -> int:
    """Train with the first process, which hears through stdout that this one is there, and of an
    error."""
    # What libraries print goes to the log; stdout is the pipe to the first process.
    pipe = os.dup(1)
    os.dup2(2, 1)
    for number in (signal.SIGINT, signal.SIGTERM):  # the first process decides what they mean
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    telemetry_off()
    try:
        _train(rank, size, port, pipe)
        return 0
    except AccordError as problem:
        from learner.offline.companions import error_line

        os.write(pipe, error_line(problem))
        return 1


def _train(rank: int, size: int, port: int, pipe: int) -> None:
    with quick_imports():
        import torch

        from learner.compute.ranks import join
        from learner.offline.companions import HERE, HOST, TIMEOUT_S, follow

    os.write(pipe, HERE)
    gpu = torch.cuda.is_available()
    ranks = join(rank, size, (HOST, port), gpu=gpu, timeout_s=TIMEOUT_S, host=HOST, device=rank)
    follow(ranks)
    ranks.leave()


def _end_with_the_first() -> None:
    """The first process holds the other end of this pipe and never writes. It closes when that
    process ends, even if it was killed."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    code = main(*map(int, sys.argv[1:]))
    sys.stderr.flush()
    # Threads of a process group whose peers have gone may hold an ordinary exit up.
    os._exit(code)
