"""Broadcast groups between real processes: one that stops, dies or comes late costs only itself.

The same code sends over NCCL: tests/gpu runs the same scenario on four GPUs.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import psutil
import pytest
import torch

from cluster.contracts.errors import Retryable
from cluster.contracts.records import Canary, WeightManifest
from cluster.weights.collective import CollectivePublisher, CollectiveReceiver
from cluster.weights.groups import Broken, Group, _harmless_watchdog, backend_of, bounded
from cluster.weights.manifest import verified
from cluster.weights.stores import store_on
from cluster.weights.transports import publish

CANARY = Canary(token_ids=(1, 2), logprobs=(-1.0,), tolerance=1e-3)
NAMES = [f"t{place}" for place in range(12)]
AT_BUCKET = 3  # of 6: where a process is stopped or killed
TIMEOUT_S = 60.0  # of a worker; the learner's is shorter, so that the test is


def published(publisher: CollectivePublisher, version: int, device: str) -> WeightManifest:
    publisher.retain([version - 1])
    tensors = {
        name: torch.full((20_000,), 1000.0 * version + i, device=device)
        for i, name in enumerate(NAMES)
    }
    dtypes = dict.fromkeys(tensors, "float32")
    return publish(publisher, tensors, dtypes, version, CANARY, bucket_bytes=200_000)


def serve(commands: Connection, replies: Connection, device: str) -> None:
    """Fetches what it is told to; (manifest, signal or None) is sent to itself half-way."""
    torch.set_num_threads(1)
    receiver = CollectiveReceiver(device)
    while (told := commands.recv()) is not None:
        made, blow = told
        try:
            kept: dict[str, torch.Tensor] = {}  # whoever needs a bucket longer may hold it
            for number, bucket in enumerate(verified(made, receiver.fetch(made, TIMEOUT_S))):
                if blow is not None and number == AT_BUCKET:
                    os.kill(os.getpid(), blow)
                kept |= bucket
            wanted = {name: 1000.0 * made.version + NAMES.index(name) for name in NAMES}
            replies.send(sum(bool((kept[name] == wanted[name]).all()) for name in kept))
        except Retryable as problem:
            replies.send(str(problem))


class Worker:
    def __init__(self, device: str) -> None:
        context = multiprocessing.get_context("forkserver")
        theirs, self._commands = context.Pipe(duplex=False)
        self._replies, sender = context.Pipe(duplex=False)
        self.process: Any = context.Process(
            target=serve, args=(theirs, sender, device), daemon=True
        )
        self.process.start()
        theirs.close()
        sender.close()

    def fetch(self, made: WeightManifest, blow: signal.Signals | None = None) -> None:
        self._commands.send((made, blow))

    def answer(self) -> Any:
        assert self._replies.poll(TIMEOUT_S + 30)
        return self._replies.recv()

    def wait_until_stopped(self) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while psutil.Process(self.process.pid).status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def close(self) -> None:
        if self.process.is_alive():
            self._commands.send(None)
            self.process.join(30)
        if self.process.is_alive():  # or this process would wait for it at its own end, for ever
            self.process.kill()
            self.process.join(30)
            raise AssertionError("a worker did not end")
        assert self.process.exitcode in (0, -signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parallel
def test_who_stops_dies_or_comes_late_in_a_group_costs_only_itself() -> None:
    who_stops_dies_or_comes_late("cpu", ("cpu", "cpu", "cpu"))


def who_stops_dies_or_comes_late(learner: str, devices: tuple[str, str, str]) -> None:
    """learner, devices: of the learner and of each worker; the worker in the place of the one that
    dies takes its device."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["cluster.weights.collective", "cluster.weights.transports"]
    )
    publisher = CollectivePublisher("127.0.0.1", timeout_s=8.0)
    workers = [Worker(device) for device in devices]
    whole = len(NAMES)
    try:
        for version in range(2):
            made = published(publisher, version, learner)
            for worker in workers:
                worker.fetch(made)
            assert [worker.answer() for worker in workers] == [whole] * 3

        # SIGSTOP is a process that hangs: it neither answers nor closes its connections.
        made = published(publisher, 2, learner)
        for worker in workers:
            worker.fetch(made, signal.SIGSTOP if worker is workers[2] else None)
        assert [worker.answer() for worker in workers[:2]] == [whole] * 2
        workers[2].wait_until_stopped()  # small buckets: the others may be done before it is
        os.kill(workers[2].process.pid, signal.SIGCONT)
        assert workers[2].answer() == whole, "awake, it asks again and gets the same bytes"

        made = published(publisher, 3, learner)
        for worker in workers:
            worker.fetch(made, signal.SIGKILL if worker is workers[2] else None)
        assert [worker.answer() for worker in workers[:2]] == [whole] * 2

        workers.append(Worker(devices[2]))  # in its place, between two versions
        made = published(publisher, 4, learner)
        for worker in (workers[0], workers[1], workers[3]):
            worker.fetch(made)
        assert [workers[place].answer() for place in (0, 1, 3)] == [whole] * 3
        old = made.version - 2
        workers[0].fetch(dataclasses.replace(made, version=old))
        assert f"no longer holds weights of version {old}" in workers[0].answer()
    finally:
        for worker in workers:
            worker.close()
        publisher.close()


def test_a_call_that_hangs_is_left_behind_at_its_deadline() -> None:
    forever = threading.Event()
    with pytest.raises(Broken, match="no connection within"):
        bounded(forever.wait, 0.05)
    with pytest.raises(Broken, match="another member gave it up"):
        bounded(forever.wait, 60.0, lambda: True)
    with pytest.raises(Broken, match="refused"):
        bounded(_refuse, 60.0)
    forever.set()


def _refuse() -> None:
    raise RuntimeError("refused")


def test_a_group_whose_member_never_comes_is_given_up_by_the_host() -> None:
    store = store_on("127.0.0.1", timedelta(seconds=30))
    cpu = torch.device("cpu")
    with pytest.raises(Broken):
        Group(lambda: backend_of(store, 0, 2, cpu, 0.2, "127.0.0.1"), cpu, 0.2)


class _Stuck:
    """What NCCL is while a peer hangs: never complete, and `wait` returns at once."""

    def is_completed(self) -> bool:
        return False

    def wait(self) -> None:
        raise AssertionError("waited for what is not complete")


def test_an_operation_that_never_completes_ends_at_the_deadline_or_when_given_up() -> None:
    group = Group.__new__(Group)
    group._device, group._backend, group._stall_s = torch.device("cpu"), None, 0.05
    group.given_up = lambda: False
    with pytest.raises(Broken, match="no progress within"):
        group.finish(_Stuck())
    group._stall_s, group.given_up = 600.0, lambda: True
    with pytest.raises(Broken, match="gave it up"):
        group.finish(_Stuck())


def test_the_watchdog_s_modes_are_set_for_the_making_of_a_group_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    monkeypatch.delenv("TORCH_NCCL_ENABLE_MONITORING", raising=False)
    with _harmless_watchdog():
        assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "2"
        assert os.environ["TORCH_NCCL_ENABLE_MONITORING"] == "0"
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"
    assert "TORCH_NCCL_ENABLE_MONITORING" not in os.environ
