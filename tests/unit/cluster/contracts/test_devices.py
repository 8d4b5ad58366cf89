"""The table of choices by device, and its page."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from cluster.contracts.devices import NUMBER_TYPE, table

ROOT = Path(__file__).resolve().parents[4]


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 0), True])
def test_a_gpu_by_any_of_its_names(device: object) -> None:
    assert NUMBER_TYPE.on(device) == "bfloat16"


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), torch.device("meta"), False])
def test_everything_else_is_a_cpu(device: object) -> None:
    assert NUMBER_TYPE.on(device) == "float32"


def test_every_choice_has_a_reason() -> None:
    assert len(table()) > 15
    assert all(len(choice.why) > 20 and "|" not in choice.what + choice.why for choice in table())


def test_the_page_is_what_the_code_says() -> None:
    spec = importlib.util.spec_from_file_location(
        "device_reference", ROOT / "docs/device_reference.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text("utf-8") == module.page(), "python docs/device_reference.py"
