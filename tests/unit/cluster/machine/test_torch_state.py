"""One state of torch in every process that computes, on processors that round and on others."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from actors.engines.transformers_engine import TransformersEngine
from actors.settings import EngineSettings
from cluster.chat.chat import chat_loop
from cluster.chat.voice import ChatSettings
from cluster.contracts.config.offline import FitConfig
from cluster.machine import torch_state
from cluster.machine.torch_state import prepare_torch, product_error
from learner.offline.setup import prepare
from learner.rl.learner import PPOLearner

ROUNDED = 2e-3  # what a product of bfloat16 numbers is off by, as "medium" gives it with AMX


@pytest.fixture(autouse=True)
def _state_restored() -> Iterator[None]:
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor where "medium" rounds to bfloat16."""

    def error() -> float:
        return ROUNDED if torch.get_float32_matmul_precision() == "medium" else 1e-7

    monkeypatch.setattr(torch_state, "product_error", error)


def test_the_chosen_product_is_still_float32() -> None:
    prepare_torch()
    a, b = torch.randn(64, 512), torch.randn(512, 64)
    error = (a @ b).double() - a.double() @ b.double()
    assert error.abs().max() < 1e-3
    assert product_error() < 1e-5


def test_threads_and_determinism_are_set() -> None:
    prepare_torch(1, deterministic=True)
    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled()
    prepare_torch()
    assert not torch.are_deterministic_algorithms_enabled()


def test_products_are_exact_on_a_processor_that_would_round(rounds: None) -> None:
    assert prepare_torch() == "highest"
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("process", ["learner", "offline training", "transformers engine", "chat"])
def test_every_process_that_computes_takes_that_state(
    process: str, rounds: None, world: ModuleType, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_float32_matmul_precision("medium")
    if process == "learner":
        PPOLearner(world.make_settings(tiny), world.KeepingPublisher()).start()
    elif process == "offline training":
        prepare(FitConfig(), seed=0)
    elif process == "transformers engine":
        TransformersEngine(
            EngineSettings(
                model_path=str(tiny), max_tokens=4, stop_token_ids=(1,), max_model_len=32
            )
        ).close()
    else:
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        chat_loop(str(tiny), None, settings=ChatSettings(max_tokens=1), seed=0)
    assert torch.get_float32_matmul_precision() == "highest"


def test_few_compiled_kernels_are_kept_unless_the_user_says_how_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, other, seen = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY", []

    def multiply() -> float:
        seen.append((os.environ[name], os.environ[other]))
        return 0.0

    monkeypatch.setattr(torch_state, "product_error", multiply)
    monkeypatch.setenv(name, "7")
    monkeypatch.delenv(other, raising=False)
    prepare_torch()
    assert os.environ[name] == "7"
    monkeypatch.delenv(name)
    prepare_torch()
    assert seen == [("7", "64"), ("64", "64")]
    assert not {name, other} & os.environ.keys(), (
        "engines that this process starts would keep as few"
    )
