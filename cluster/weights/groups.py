"""Groups of processes that weights are broadcast in, with deadlines that the host keeps.

NCCL between GPUs, gloo between processes without one; the code is the same up to the constructor.
A member that is dead, stopped or hung never answers, and by itself neither backend lets its host
out: `Work.wait` of NCCL blocks a stream and not the host. So the host polls `is_completed`, looks
whether another member has given the group up, and after ``stall_s`` gives it up itself.

What may end the process: NCCL's watchdog, a thread of torch, ends it when an operation fails or
takes too long. ``ErrorHandlingMode`` in ``ProcessGroupNCCL.hpp`` (torch 2.13, lines 160-176) has
four modes; the default, ``SkipCleanUp``, "tears down the process", ``CleanUpOnly`` aborts the
communicator and no more (``SHOULD_TEAR_DOWN``). The monitor of the watchdog's heartbeat ends it
too, where ``TORCH_NCCL_ENABLE_MONITORING`` is not off (lines 96-102). Both are read from the
environment when a group is made, so they are set for this one moment: the groups that train keep
torch's own handling. A process of its own would be safe as well, but two processes on one GPU
take turns instead of computing side by side, so that training would wait for the sender.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.weights.stores import gloo_on

_POLL_S = 0.0005
_LONGEST_POLL_S = 0.005
_LOOK_S = 0.1  # between two looks at the store
_WATCHDOG_S = 3600.0  # added to the deadline: the host's own always comes first
_HARMLESS = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "2", "TORCH_NCCL_ENABLE_MONITORING": "0"}
_environment = threading.Lock()

T = TypeVar("T")


class Broken(Exception):
    """The group did not finish within its deadline, or a member gave it up."""


def nobody_gave_up() -> bool:
    return False


class Group:
    """One process's end of a group. Rank 0 sends; used by one thread at a time.

    given_up: asked ten times a second while this end waits; True ends the wait.
    Raises Broken from everything; then `leave` it.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        device: torch.device,
        stall_s: float,
        given_up: Callable[[], bool] = nobody_gave_up,
    ) -> None:
        self._device = device
        self._stall_s = stall_s
        self.given_up = given_up
        # A communicator of NCCL connects in its first operation, which blocks the host.
        first = torch.zeros(1, dtype=torch.uint8, device=device)
        self._backend: Any = None
        self._backend, work = bounded(lambda: self._connect(make, first), stall_s, given_up)
        self.finish(work)

    def _connect(self, make: Callable[[], Any], first: Tensor) -> tuple[Any, Any]:
        if self._device.type == "cuda":  # a thread begins with device 0 as its current one
            torch.cuda.set_device(self._device)
        backend = make()
        return backend, _broadcast(backend, first)

    def begin(self, buffer: Tensor) -> Any:
        """Start to broadcast ``buffer`` behind what the current stream holds; see `finish`."""
        try:
            return _broadcast(self._backend, buffer)
        except RuntimeError as problem:
            raise Broken(str(problem)) from None

    def finish(self, work: Any) -> None:
        """Return when the operation is done on the device."""
        ends, look, pause = time.monotonic() + self._stall_s, time.monotonic() + _LOOK_S, _POLL_S
        while not work.is_completed():
            now = time.monotonic()
            if now > ends:
                raise Broken(f"no progress within {self._stall_s:.0f} s")
            if now > look:
                if self.given_up():
                    raise Broken("another member gave it up")
                look = now + _LOOK_S
            time.sleep(pause)
            pause = min(_LONGEST_POLL_S, pause * 1.2)
        try:
            work.wait()  # it is done: this raises what gloo failed with, and waits for nothing
        except RuntimeError as problem:
            raise Broken(str(problem)) from None
        if self._device.type == "cuda" and self._backend is not None:
            state = self._backend.get_error()
            if "SUCCESS" not in str(state):
                raise Broken(f"NCCL: {state}")
        # A member that slept may be brought bytes that the sender no longer vouches for.
        if self.given_up():
            raise Broken("another member gave it up")

    def leave(self, wait_s: float = 0.0) -> None:
        """Give the group up. What hangs in it is ended by NCCL's abort, or by gloo's own deadline;
        this waits for that at most so long."""
        backend, self._backend = self._backend, None

        def end(held: list[Any]) -> None:
            with suppress(RuntimeError):
                held[0].abort()
            held.clear()  # the destructor joins gloo's threads

        if backend is not None:
            held = [backend]
            del backend
            thread = threading.Thread(target=end, args=(held,), name="weights-leave", daemon=True)
            thread.start()
            thread.join(wait_s)


def backend_of(
    store: Any, rank: int, size: int, device: torch.device, stall_s: float, host: str
) -> Any:
    """NCCL's or gloo's communicator; gloo listens on ``host`` only."""
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=stall_s + _WATCHDOG_S)
        with _harmless_watchdog():
            return dist.ProcessGroupNCCL(store, rank, size, options)
    return dist.ProcessGroupGloo(
        store, rank, size, gloo_on(host, timedelta(seconds=max(1.0, stall_s)))
    )


def bounded(
    call: Callable[[], T], seconds: float, given_up: Callable[[], bool] = nobody_gave_up
) -> T:
    """What ``call`` returns, from a thread of its own that is left behind when it takes longer.

    Raises Broken then, when it is given up, and for what torch.distributed raises.
    """
    answer: list[T] = []
    problem: list[BaseException] = []

    def run() -> None:
        try:
            answer.append(call())
        except BaseException as raised:
            problem.append(raised)

    thread = threading.Thread(target=run, name="weights-connect", daemon=True)
    thread.start()
    ends = time.monotonic() + seconds
    while thread.is_alive() and time.monotonic() < ends:
        thread.join(_LOOK_S)
        if thread.is_alive() and given_up():
            raise Broken("another member gave it up")
    if problem:
        if isinstance(problem[0], RuntimeError | OSError):
            raise Broken(str(problem[0])) from None
        raise problem[0]
    if not answer:
        raise Broken(f"no connection within {seconds:.0f} s")
    return answer[0]


@contextmanager
def _harmless_watchdog() -> Iterator[None]:
    with _environment:
        before = {name: os.environ.get(name) for name in _HARMLESS}
        os.environ.update(_HARMLESS)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _broadcast(backend: Any, buffer: Tensor) -> Any:
    options = dist.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    options.asyncOp = True
    return backend.broadcast([buffer], options)
