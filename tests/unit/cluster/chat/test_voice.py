"""Which policy a path means, and text that appears letter by letter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.chat.voice import _Pieces, policy_directory
from cluster.contracts.errors import UserError


def test_a_run_stands_for_its_policy_or_that_of_its_newest_checkpoint(tmp_path: Path) -> None:
    assert policy_directory("some/hub-id") == "some/hub-id"
    assert policy_directory(str(tmp_path)) == str(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="without a policy"):
        policy_directory(str(tmp_path))
    for step in (10, 999_999, 1_000_000):
        (tmp_path / "checkpoints" / f"step-{step:06d}" / "policy").mkdir(parents=True)
    assert policy_directory(str(tmp_path)).endswith("step-1000000/policy")
    (tmp_path / "policy").mkdir()
    assert policy_directory(str(tmp_path)) == str(tmp_path / "policy")


class Bytes:
    """Each token is one byte of UTF-8."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def test_pieces_appear_at_once_but_letters_only_whole() -> None:
    shown: list[str] = []
    pieces = _Pieces(Bytes(), shown.append)
    pieces.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for byte in "né你".encode() + b"\xe4":
        pieces.put(torch.tensor([byte]))
    assert shown == ["n", "é", "你"]
    pieces.end()
    assert pieces.text == "né你\N{REPLACEMENT CHARACTER}"
    assert "".join(shown) == pieces.text
    assert len(pieces.ids) == 7
