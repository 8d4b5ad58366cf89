"""The processes of one fit on this machine: the command itself is the first, and starts the others.

    with companions(2, threads=1, logs=run_dir, on_loss=...) as meet:
        lead(work, meet)

A companion is `python -m learner.offline.companion`. It meets the first process, hears from it what
to train (`follow`), and runs the very function that the first one runs. Its stdin is a pipe that
nobody writes to: it ends when the first process does, however that ended, and the companion with
it. It is in a session of its own, so that a Ctrl-C in the terminal reaches the first process only,
which lets the step end and saves.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from cluster.contracts import errors
from cluster.contracts.config.offline import FitConfig
from cluster.contracts.errors import AccordError, PeerLost, Resumable, UserError
from cluster.contracts.plugins import install, loaded
from learner.compute.ranks import (
    SINGLE,
    Ranks,
    join,
    join_launched,
    launched_processes,
    meeting_place,
)

Command = Literal["sft", "reward-model", "dpo"]
HOST = "127.0.0.1"
TIMEOUT_S = 1800.0
"""So long a process waits for the others: rank 0 may write a large model meanwhile."""
_MEET_S = 300.0
HERE = b"+"
"""What a companion writes to stdout when it is about to meet the others."""
_GRACE_S = 10.0
"""After a companion has ended: for the first process to meet the loss by itself, in a collective;
at the end: for companions to leave by themselves."""
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Work:
    """What all processes of a fit do: `command` with `config`, into `run_dir`."""

    command: Command
    config: Any
    run_dir: Path


NOTHING = Work("sft", None, Path())
"""What a process has that is to be told."""


def lead(work: Work, meet: Callable[[], Ranks], **reports: Any) -> Path:
    """In the first process: tell the others, and train with them.

    meet: waits for the others. reports: `progress`, `should_stop` and `on_rows`.
    On a CPU this process reads the rows while the others start, and hands them over: who reads
    takes a core that could train. On GPUs each reads for itself, and nothing travels.
    """
    task = _task(work)
    rows = None if torch.cuda.is_available() else task.read(work.config)
    ranks = meet()
    ranks.from_first(loaded())
    ranks.from_first(work)
    ranks.from_first(rows)
    saved = task.train(work.config, work.run_dir, ranks=ranks, rows=rows, **reports)
    ranks.barrier()
    return saved


def follow(ranks: Ranks) -> None:
    """In every other process: hear what to train, and train it."""
    # Plugins first: a config may name what they add.
    install(ranks.from_first(()))
    work, rows = ranks.from_first(NOTHING), ranks.from_first(None)
    _task(work).train(work.config, work.run_dir, ranks=ranks, rows=rows)
    ranks.barrier()


@dataclass(frozen=True, slots=True)
class _Task:
    """How a command reads its rows, and how it trains on them."""

    read: Callable[[Any], Any]
    train: Callable[..., Path]


def _task(work: Work) -> _Task:
    if work.command == "sft":
        from learner.offline import sft

        return _Task(sft.read_rows, sft.train_sft)
    if work.command == "dpo":
        from learner.offline import dpo

        return _Task(dpo.read_rows, dpo.train_dpo)
    from learner.offline import reward

    return _Task(reward.read_rows, reward.train_reward_model)


def check_processes(config: FitConfig) -> None:
    """Raise UserError for more processes than GPUs, or another number than torchrun started."""
    launched = launched_processes()
    if launched is not None and config.processes != launched:
        raise UserError(
            f"fit.processes is {config.processes}, but torchrun started {launched} processes",
            where="fit.processes",
            fix=f"set fit.processes={launched}, or start the command without torchrun",
        )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if launched is None and gpus and config.processes > gpus:
        raise UserError(
            f"{config.processes} processes cannot have a GPU each: this machine has {gpus}",
            where="fit.processes",
            fix=f"set it to {gpus}, or start the command on several machines with torchrun",
        )


def joined_by_torchrun() -> Ranks | None:
    """The processes that torchrun started, this one among them; None without torchrun."""
    if launched_processes() is None:
        return None
    return join_launched(gpu=torch.cuda.is_available(), timeout_s=TIMEOUT_S)


@contextmanager
def companions(
    size: int, threads: int, logs: Path, on_loss: Callable[[str], None]
) -> Iterator[Callable[[], Ranks]]:
    """Start `size - 1` companions; yields a function that waits for them, and then returns all
    ranks. `threads`: compute threads of each.

    What they write goes to `logs`/process-N.log. on_loss: called from another thread with a
    message, when a companion has ended and this process does not notice, because it waits in a
    collective that never ends; it should end the command.

    Raises what a companion raised; Resumable when one was killed. None is left afterwards.
    """
    if size == 1:
        yield lambda: SINGLE
        return
    gpu = torch.cuda.is_available()
    store = meeting_place(HOST, _MEET_S)
    team = _Team(on_loss)
    met: list[Ranks] = []

    def meet() -> Ranks:
        team.wait_for_all()
        met.append(join(0, size, store, gpu=gpu, timeout_s=TIMEOUT_S, host=HOST, device=0))
        return met[0]

    try:
        for rank in range(1, size):
            team.start(rank, size, store.port, threads, logs)
        yield meet
        team.over = True
    except BaseException as problem:
        team.left.set()
        cause = team.cause(problem)
        if cause is not problem:
            raise cause from None
        raise
    finally:
        team.left.set()
        for ranks in met:
            ranks.leave()
        team.end()


class _Team:
    """The companions of the first process, each with a thread that waits for its end."""

    def __init__(self, on_loss: Callable[[str], None]) -> None:
        self._on_loss = on_loss
        self._members: list[tuple[int, subprocess.Popen[bytes], Path, threading.Thread]] = []
        self._lost: dict[int, AccordError] = {}
        self._here = threading.Semaphore(0)
        self.over = False  # companions may end from now on
        self.left = threading.Event()  # the first process has left, for whatever reason

    def start(self, rank: int, size: int, port: int, threads: int, logs: Path) -> None:
        log = logs / f"process-{rank}.log"
        environment = {**os.environ, **dict.fromkeys(_THREAD_VARIABLES, str(threads))}
        paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        words = [sys.executable, "-m", "learner.offline.companion", *map(str, (rank, size, port))]
        with log.open("ab") as output:
            process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
        watch = threading.Thread(target=self._watch, args=(rank, process, log), daemon=True)
        self._members.append((rank, process, log, watch))
        watch.start()

    def wait_for_all(self) -> None:
        """Until all have imported what they need. Raises PeerLost when one has ended instead."""
        for _ in self._members:
            self._here.acquire(timeout=_MEET_S)
        if self._lost:
            raise PeerLost("a process of this training ended while it was starting")

    def _watch(self, rank: int, process: subprocess.Popen[bytes], log: Path) -> None:
        assert process.stdout is not None
        if process.stdout.read(1) == HERE:
            self._here.release()
        said = process.stdout.read()  # until it ends; nothing but an error it raised
        code = process.wait()
        if code == 0 or self.over:
            return
        self._lost[rank] = _loss(rank, code, said, log)
        self._here.release()  # whoever waits for it need not
        if not self.left.wait(_GRACE_S):
            self._on_loss(str(self._lost[rank]))

    def cause(self, problem: BaseException) -> BaseException:
        """What to raise for `problem`, which the first process met: it may only have met the end of
        a companion, which then says more."""
        if isinstance(problem, AccordError) and not isinstance(problem, PeerLost):
            return problem
        if not isinstance(problem, Exception):  # an interrupt
            return problem
        deadline = time.monotonic() + _GRACE_S
        while not self._lost and time.monotonic() < deadline and self._alive():
            time.sleep(0.05)
        for _, _, _, watch in self._members:
            watch.join(0.2)
        # A companion that met the end of another one says no more than the first process does.
        first = sorted(self._lost.values(), key=lambda one: isinstance(one, PeerLost))
        return first[0] if first else problem

    def _alive(self) -> bool:
        return any(watch.is_alive() for _, _, _, watch in self._members)

    def end(self) -> None:
        """All of them end: by themselves when the work is done, else by force."""
        deadline = time.monotonic() + (_GRACE_S if self.over else 0.0)
        for _, process, log, watch in self._members:
            with contextlib.suppress(OSError):
                if process.stdin is not None and not self.over:
                    process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            if process.poll() is None:
                process.kill()
            process.wait()
            watch.join()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            with contextlib.suppress(OSError):
                if self.over and log.stat().st_size == 0:
                    log.unlink()


def error_line(problem: AccordError) -> bytes:
    """What a companion says of an error, for `_loss`."""
    if isinstance(problem, UserError):
        given = {"what": problem.what, "where": problem.where, "fix": problem.fix}
        return json.dumps(given).encode()
    return json.dumps({"kind": type(problem).__name__, "text": str(problem)}).encode()


def _loss(rank: int, code: int, said: bytes, log: Path) -> AccordError:
    """What a companion raised, or how it ended."""
    with contextlib.suppress(ValueError):  # it said nothing, or was killed while it did
        told = json.loads(said)
        if "what" in told:
            return UserError(told["what"], where=told["where"], fix=told["fix"])
        raised: AccordError = getattr(errors, told["kind"], AccordError)(told["text"])
        return raised
    how = f"ended with code {code}"
    if code < 0:
        with contextlib.suppress(ValueError):
            how = f"was killed by {signal.Signals(-code).name}"
    written = log.read_text(encoding="utf-8", errors="replace").strip()
    last = f" Its last words: {written.splitlines()[-1]}" if written else ""
    return Resumable(
        f"process {rank} of this training {how}.{last} Training can go on from the newest "
        f"checkpoint with --resume. What the process wrote is in {log}"
    )
