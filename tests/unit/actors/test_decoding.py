"""Stop strings: found at the token that completes them, and cut off the text."""

from __future__ import annotations

import pytest

from actors.decoding import StopStrings

PIECES = ["", "a", "b", "ab", "\n", "###", "#", " end", "x#"]  # 0: a special token, without text


def text(ids: object) -> str:
    return "".join(PIECES[i] for i in ids)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("stops", "ids", "ends", "left"),
    [
        (["ab"], [4, 3], True, "\n"),
        (["ab"], [1, 2], True, ""),  # across two tokens
        (["ab"], [3, 1], False, "aba"),  # before min_tokens, so it did not end it
        (["b#"], [1, 2, 5], True, "a"),  # the token goes on after the string
        (["##", "#"], [1, 5], True, "a"),  # the first one counts
        (["###"], [8, 6, 6], True, "x"),
        (["zz"], [1, 2, 7], False, "ab end"),
        ([], [1, 2], False, "ab"),
        (["ab"], [3, 0], False, "ab"),  # ended by the end token
    ],
)
def test_stop_strings(stops: list[str], ids: list[int], ends: bool, left: str) -> None:
    made = StopStrings(stops, text)
    assert made.ends(ids) == ends
    assert made.cut(ids, text(ids)) == left


def test_only_the_end_of_a_long_completion_is_decoded() -> None:
    seen: list[int] = []

    def counting(ids: object) -> str:
        seen.append(len(ids))  # type: ignore[arg-type]
        return text(ids)

    made = StopStrings(["ab"], counting)
    assert made.ends([4] * 5000 + [1, 2])
    assert max(seen) <= 12
