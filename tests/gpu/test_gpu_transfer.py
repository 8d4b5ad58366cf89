"""Weights between processes on real GPUs: every byte, and how long it takes."""

from __future__ import annotations

import importlib
import importlib.util
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.contracts.records import Canary
from cluster.weights.collective import CollectivePublisher
from cluster.weights.device_buffer import mixed_sums
from cluster.weights.shared_device import SharedDevicePublisher
from cluster.weights.transports import publish

pytestmark = pytest.mark.gpu
CANARY = Canary(token_ids=(1, 2), logprobs=(-1.0,), tolerance=1e-3)
PROCESSES = Path(__file__).parents[1] / "unit" / "cluster" / "weights" / "test_device_weights.py"


@pytest.fixture(scope="module")
def helper() -> Any:
    """The module with the fetching process that the CPU's tests use."""
    spec = importlib.util.spec_from_file_location("accord_tests_device_weights", PROCESSES)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    make = {"generator": generator, "device": "cuda"}
    return {
        "w": torch.randn(4096, 4099, **make),
        "half": torch.randn(70001, **make).to(torch.bfloat16),
        "scalar": torch.randn((), **make),
    }


DTYPES = {"w": "float32", "half": "bfloat16", "scalar": "float32"}


def fetched_equal(helper: Any, make: str, publisher: Any, device: str, monkeypatch: Any) -> float:
    """Three versions through another process; seconds of the last fetch, its checks included."""
    monkeypatch.setenv("ACCORD_TEST_DEVICE", device)
    process = helper.Process(make)
    seconds = 0.0
    try:
        for version in range(3):
            given = tensors(version)
            made = publish(publisher, given, DTYPES, version, CANARY)
            given["w"].zero_()  # the learner trains on
            began = time.perf_counter()
            got = process.fetch(made)
            seconds = time.perf_counter() - began
            assert isinstance(got, dict), got
            for name, tensor in tensors(version).items():
                assert (got[name] == tensor.float().cpu().numpy()).all(), name
    finally:
        process.close()
        publisher.close()
    return seconds


def test_one_gpu_shares_its_memory_byte_for_byte(
    helper: Any, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    spent = fetched_equal(helper, "shared_device", SharedDevicePublisher(), "cuda:0", monkeypatch)
    record_property("shared_device_fetch_s", spent)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each process")
def test_nccl_brings_every_byte(
    helper: Any, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    publisher = CollectivePublisher("127.0.0.1", 60.0)
    spent = fetched_equal(helper, "collective", publisher, "cuda:1", monkeypatch)
    record_property("nccl_fetch_s", spent)


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="a learner and three workers")
def test_who_stops_dies_or_comes_late_in_a_group_costs_only_itself() -> None:
    """And it does not end this process, which is the learner: torch's watchdog would."""
    module = importlib.import_module("tests.unit.cluster.weights.test_collective")
    module.who_stops_dies_or_comes_late("cuda:0", ("cuda:1", "cuda:2", "cuda:3"))


def test_the_sum_on_the_gpu_is_that_on_the_cpu() -> None:
    given = tensors(0)
    on_cpu = {name: tensor.cpu() for name, tensor in given.items()}
    assert mixed_sums(given.values()) == mixed_sums(on_cpu.values())
