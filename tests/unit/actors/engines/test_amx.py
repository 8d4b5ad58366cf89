"""AMX's registers: asked for, and done without where they are refused."""

from __future__ import annotations

import pytest
import torch

from actors.engines.amx import ask_for_amx


@pytest.mark.parametrize(
    ("has", "given", "left"), [(True, True, True), (True, False, False), (False, False, False)]
)
def test_vllm_is_told_what_this_process_may_use(
    monkeypatch: pytest.MonkeyPatch, has: bool, given: bool, left: bool
) -> None:
    asked = []
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: asked.append(1) or given)
    ask_for_amx()
    assert torch.cpu._is_amx_tile_supported() is left
    assert len(asked) == has
