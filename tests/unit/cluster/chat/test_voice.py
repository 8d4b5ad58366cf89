"""Text that appears letter by letter."""

from __future__ import annotations

import torch

from cluster.chat.voice import _Pieces


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
