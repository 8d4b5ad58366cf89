"""Weights that stay tensors: one flat buffer, sums computed in place, and two real processes."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cluster.contracts.errors import Retryable, UserError, WeightMismatch
from cluster.contracts.records import Canary, WeightManifest
from cluster.weights.collective import CollectivePublisher, CollectiveReceiver
from cluster.weights.device_buffer import layout, mixed_sums, pack, unpack
from cluster.weights.intake import Intake
from cluster.weights.manifest import verified
from cluster.weights.shared_device import SharedDevicePublisher, SharedDeviceReceiver, require_same
from cluster.weights.transports import publish
from cluster.weights.update import Nowhere, Update

CANARY = Canary(token_ids=(1, 2, 3), logprobs=(-1.0, -2.0), tolerance=1e-3)
DEVICE = os.environ.get("ACCORD_TEST_DEVICE", "cpu")  # set by tests/gpu for its child processes
DTYPES = {"w": "float32", "half": "bfloat16", "scalar": "float32"}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(300, 5, generator=generator),
        "half": torch.randn(7, generator=generator).to(torch.bfloat16),
        "scalar": torch.randn((), generator=generator),
    }


def equal(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return got.keys() == wanted.keys() and all(torch.equal(got[n], wanted[n]) for n in wanted)


def manifest(given: dict[str, torch.Tensor]) -> WeightManifest:
    with Update(3, "shared_device", Nowhere()) as update:
        update.add(given, DTYPES)
        return update.close(CANARY)


def test_the_layout_is_aligned() -> None:
    assert layout([6000, 14, 4]) == ([0, 6144, 6400], 6656)
    assert layout([]) == ([], 0)


def test_a_packed_update_comes_out_bit_for_bit_and_shares_the_buffer() -> None:
    given = tensors(0)
    buffer = pack(given)
    got = unpack(buffer, manifest(given).tensors)
    assert equal(got, given)
    assert got["w"].data_ptr() == buffer.data_ptr()
    assert pack(tensors(1), buffer) is buffer
    assert equal(got, tensors(1))


def test_a_buffer_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="6655 bytes, 6656 announced"):
        unpack(torch.zeros(6655, dtype=torch.uint8), manifest(tensors(0)).tensors)


def test_the_sum_by_hand() -> None:
    """(w + 1) * m with m_0 = c and m_1 = 3c for c the golden ratio's 64-bit number."""
    c = 0x9E3779B97F4A7C15
    words = torch.tensor([5, -2], dtype=torch.int32).view(torch.float32)
    assert mixed_sums([words]) == [f"mix64:{(6 * c - 3 * c) % 2**64:016x}"]


@pytest.mark.parametrize("size", [1, 3, 4, 1000, (1 << 20) + 3])
def test_every_change_of_a_word_and_every_exchange_changes_the_sum(size: int) -> None:
    values = torch.arange(size, dtype=torch.float32)
    before = mixed_sums([values])
    for place in {0, size // 2, size - 1}:
        changed = values.clone()
        changed.view(torch.int32)[place] ^= 1
        assert mixed_sums([changed]) != before
    if size > 1:
        exchanged = values.clone()
        exchanged[[0, -1]] = values[[-1, 0]]
        assert mixed_sums([exchanged]) != before
    assert mixed_sums([torch.zeros(4)]) != mixed_sums([torch.zeros(5)])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop("half"), "'half': missing"),
        (lambda t: t.update(w=t["w"].T), "'w': shape"),
        (lambda t: t.update(half=t["half"].float()), "'half': carried as float32"),
        (lambda t: t["w"].view(torch.int32)[299, 4].bitwise_xor_(1), "'w': checksum"),
    ],
)
def test_damaged_tensors_are_refused_by_name(damage: Any, words: str) -> None:
    made, given = manifest(tensors(0)), tensors(0)
    damage(given)
    with pytest.raises(WeightMismatch, match=words):
        list(verified(made, [given]))


def taken(receiver: Any, made: WeightManifest, timeout_s: float = 30.0) -> dict[str, torch.Tensor]:
    return dict(Intake(receiver, timeout_s).take(made))


def serve(make: str) -> None:
    """A process that fetches what it is told to and says what came."""
    torch.set_num_threads(1)
    kind: Any = CollectiveReceiver if make == "collective" else SharedDeviceReceiver
    receiver = kind(DEVICE)
    commands, replies = Connection(0, writable=False), Connection(1, readable=False)
    while (made := commands.recv()) is not None:
        try:
            got = taken(receiver, made)
            reply: Any = {name: tensor.float().cpu().numpy().copy() for name, tensor in got.items()}
        except (Retryable, WeightMismatch) as problem:
            reply = str(problem)
        replies.send(reply)


class Process:
    def __init__(self, make: str) -> None:
        root = Path(__file__).resolve().parents[4]
        self.process = subprocess.Popen(
            [sys.executable, __file__, make],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def fetch(self, made: WeightManifest | None) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        commands = Connection(os.dup(self.process.stdin.fileno()), readable=False)
        replies = Connection(os.dup(self.process.stdout.fileno()), writable=False)
        with commands, replies:
            commands.send(made)
            return None if made is None else replies.recv()

    def close(self) -> None:
        if self.process.poll() is None:
            self.fetch(None)
        self.process.communicate(timeout=20)
        assert self.process.returncode in (0, -9)


@pytest.fixture(params=["collective", "shared_device"])
def world(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Process, Process]]:
    name = request.param
    publisher: Any = (
        CollectivePublisher("127.0.0.1", 10.0) if name == "collective" else None
    ) or SharedDevicePublisher()
    workers = Process(name), Process(name)
    yield publisher, *workers
    for process in workers:
        process.close()
    publisher.close()


@pytest.mark.slow
@pytest.mark.parallel
def test_two_processes_get_every_version_bit_for_bit(world: tuple[Any, Process, Process]) -> None:
    publisher, first, second = world
    for version in range(4):
        given = tensors(version)
        publisher.retain([version - 1])
        made = publish(publisher, given, DTYPES, version, CANARY, bucket_bytes=100)
        given["w"].zero_()  # the learner trains on while it is fetched
        expected = {name: t.float().numpy() for name, t in tensors(version).items()}
        for process in (first, second) if version != 1 else (second,):  # one may leave one out
            got = process.fetch(made)
            assert isinstance(got, dict), got
            assert all((got[name] == expected[name]).all() for name in expected)


@pytest.mark.slow
@pytest.mark.parallel
def test_strangers_get_nothing_and_end_nothing() -> None:
    """Without the run's secret nobody gets past the gate; who is on the learner's machine and
    writes nonsense into its store is not answered; the weights go on."""
    publisher = CollectivePublisher("127.0.0.1", 10.0)
    receiver = CollectiveReceiver("cpu")
    try:
        made = publish(publisher, tensors(0), DTYPES, 0, CANARY, bucket_bytes=100)
        host, port, _ = made.locator
        with pytest.raises(Retryable, match=r"does not know|ended within"):
            taken(
                CollectiveReceiver("cpu"),
                dataclasses.replace(made, locator=(host, port, b"another secret")),
            )
        for nonsense in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(4096)):
            with socket.create_connection((host, port)) as stranger:
                stranger.sendall(nonsense)
        local = publisher._store.clone()
        for nonsense in (b"", b"7", b"1 1 0", b"stop", b"\xff\xfe", b"0" * 64 + b" 1 1 0"):
            local.queue_push("asks", nonsense)
        assert equal(taken(receiver, made), tensors(0))
        assert local.num_keys() < 50  # no answer to any of them
        listening = {
            c.laddr.ip
            for c in psutil.Process().net_connections("inet")
            if c.status == psutil.CONN_LISTEN
        }
        assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    finally:
        publisher.close()


@pytest.mark.slow
@pytest.mark.parallel
def test_a_publisher_that_is_gone_is_retryable() -> None:
    publisher = CollectivePublisher("127.0.0.1", 2.0)
    made = publish(publisher, tensors(0), DTYPES, 0, CANARY, bucket_bytes=100)
    receiver = CollectiveReceiver("cpu")
    assert equal(taken(receiver, made), tensors(0))
    publisher.close()
    with pytest.raises(Retryable, match="version 0"):
        taken(receiver, made, timeout_s=1.0)


def test_two_gpus_share_no_memory() -> None:
    require_same(None, None)
    require_same("GPU-1", "GPU-1")
    for learner, worker in (("GPU-1", "GPU-2"), ("GPU-1", None), (None, "GPU-2")):
        with pytest.raises(UserError, match="share no memory"):
            require_same(learner, worker)
    publisher = SharedDevicePublisher()
    made = publish(publisher, tensors(0), DTYPES, 0, CANARY)
    elsewhere = dataclasses.replace(made, locator=("GPU-1", made.locator[1]))
    with pytest.raises(UserError, match=r"on GPU GPU-1.*on a CPU"):
        taken(SharedDeviceReceiver(), elsewhere)
    publisher.close()


if __name__ == "__main__":
    serve(sys.argv[1])
