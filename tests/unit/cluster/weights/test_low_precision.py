"""A base in fewer bits where torchao is not installed."""

from __future__ import annotations

import sys

import pytest
import torch

from cluster.contracts.errors import UserError
from cluster.weights.low_precision import Precision, quantised


@pytest.mark.parametrize("precision", ["8bit", "4bit"])
def test_without_torchao_it_is_said_what_to_install(
    precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("torchao")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=f"a base in {precision} needs torchao") as problem:
        quantised(torch.ones(64, 64), precision)
    assert problem.value.where == "lora.base"
    weight = torch.ones(3, 3)
    assert quantised(weight, "full") is weight
