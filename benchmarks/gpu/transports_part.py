"""Weights from this process to another one, by each transport: every byte, and how long it takes.

python -m benchmarks.gpu.transports_part TRANSPORT DEVICE      the other process
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.report import Found
from benchmarks.gpu.scale import Scale
from cluster.contracts.records import Canary
from cluster.weights.device_buffer import mixed_sums
from cluster.weights.intake import Intake
from cluster.weights.transports import PublisherOptions, make_publisher, make_receiver, publish

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = 3
DTYPES = {"w": "float32", "half": "bfloat16", "scalar": "float32"}
CANARY = Canary(token_ids=(1, 2), logprobs=(-1.0,), tolerance=1e-3)
TIMEOUT_S = 60.0


def run(scale: Scale, folder: Path, found: Found, *, out: Path) -> None:
    devices = torch.cuda.device_count() if scale.gpus else 0
    for transport, own, other in _routes(devices):
        seconds, wrong = _brought(transport, own, other, folder, rows=4096 if devices else 64)
        found.at_most(f"{transport}, {own} to {other}: wrong tensors", wrong, 0.0)
        found.at_most(f"{transport}, {own} to {other}: s", seconds, None)
    if devices == 1:
        found.figures["left out"] = "collective: NCCL needs a GPU for each process"


def _routes(devices: int) -> Iterator[tuple[str, str, str]]:
    """(transport, the learner's device, the worker's)."""
    own = "cuda:0" if devices else "cpu"
    yield "disk", own, own
    yield "shared_device", own, own
    if devices != 1:
        yield "collective", own, "cuda:1" if devices else "cpu"


def _brought(transport: str, own: str, other: str, folder: Path, rows: int) -> tuple[float, float]:
    """(seconds of the last fetch with its checks, tensors of all versions that came wrong)."""
    options = PublisherOptions(directory=str(folder / transport), host="127.0.0.1")
    publisher = make_publisher(transport, options)
    seconds, wrong = 0.0, 0
    try:
        with _other_process(transport, other) as ask:
            for version in range(VERSIONS):
                given = _tensors(own, version, rows)
                expected = mixed_sums(given.values())
                there = given if publisher.on_device else _on_host(given)
                made = publish(publisher, there, DTYPES, version, CANARY)
                for tensor in given.values():
                    tensor.zero_()  # the learner trains on
                seconds, got = ask(made)
                wrong += sum(a != b for a, b in zip(expected, got, strict=True))
                publisher.retain([version])
    finally:
        publisher.close()
    return seconds, float(wrong)


def _tensors(device: str, seed: int, rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device=device).manual_seed(seed)
    make: dict[str, Any] = {"generator": generator, "device": device}
    return {
        "w": torch.randn(rows, 4099, **make),
        "half": torch.randn(70001, **make).to(torch.bfloat16),
        "scalar": torch.randn((), **make),
    }


def _on_host(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """As the learner hands them to a host transport: bfloat16 as the integers of its bits."""
    return {
        name: (
            t.cpu().view(torch.uint16).numpy() if t.dtype == torch.bfloat16 else t.cpu().numpy()
        ).copy()
        for name, t in tensors.items()
    }


@contextmanager
def _other_process(transport: str, device: str) -> Iterator[Any]:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu.transports_part", transport, device],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    questions = Connection(os.dup(process.stdin.fileno()), readable=False)
    answers = Connection(os.dup(process.stdout.fileno()), writable=False)

    def ask(manifest: Any) -> Any:
        questions.send(manifest)
        if manifest is None:
            return None
        if not answers.poll(2 * TIMEOUT_S):
            raise TimeoutError(f"{transport}: the other process did not answer")
        return answers.recv()

    try:
        yield ask
        ask(None)
        process.wait(20)
    finally:
        process.kill()
        process.communicate()


def serve(transport: str, device: str) -> None:
    """Fetches each manifest that comes, and answers (seconds, the sums of its tensors)."""
    intake = Intake(make_receiver(transport, device), TIMEOUT_S)
    questions, answers = Connection(0, writable=False), Connection(1, readable=False)
    while (manifest := questions.recv()) is not None:
        began = time.perf_counter()
        # One by one: the memory of a bucket may be the next one's.
        sums = {name: mixed_sums([_tensor(array)])[0] for name, array in intake.take(manifest)}
        answers.send((time.perf_counter() - began, [sums[name] for name in DTYPES]))


def _tensor(array: Any) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        return array
    tensor = torch.from_numpy(np.array(array))
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2])
