"""Completions on a console: one line each, as wide as asked, and no control character."""

from __future__ import annotations

from typing import Any

import pytest
from rich.cells import cell_len

from cluster.contracts.samples import SampleInfo
from cluster.runs.sample_text import sample_lines, table_lines


def sample(prompt: str = "Why?", completion: str = "Because.", **more: Any) -> SampleInfo:
    return SampleInfo(
        step=3,
        group=7,
        sample=1,
        prompt_id="p",
        prompt=({"role": "user", "content": prompt},),
        completion=completion,
        **{"score": 0.5, "tokens": 9, **more},
    )


def test_a_sample_is_one_line_however_long_or_broken() -> None:
    long = sample("first line\n\nsecond   line", "word " * 200)
    header, line = table_lines([("best", long)], width=100)
    assert line.startswith("  best    +0.500      9  first line second line")
    assert line.endswith("…")
    assert len(line) <= 100
    assert header.index("completion") == line.index("word")


def test_wide_letters_keep_the_columns_straight() -> None:
    wide = sample("为什么" * 20, "因为" * 60)
    header, line = table_lines([("worst", wide)], width=100)
    start = line[: line.index("因")]
    assert cell_len(start) == header.index("completion")
    assert cell_len(line) <= 100


@pytest.mark.parametrize("evil", ["\x1b[2J", "\x1b]0;title\x07", "\u202eabc", "\r", "\x9b31m"])
def test_control_characters_do_not_reach_the_terminal(evil: str) -> None:
    one = sample(f"q{evil}q", f"a{evil}\nb")
    shown = "\n".join([*table_lines([("best", one)]), *sample_lines("best", one)])
    assert all(c.isprintable() or c == "\n" for c in shown)


def test_a_sample_in_full_keeps_its_lines_and_says_what_is_known() -> None:
    one = sample(
        completion="one\ntwo",
        parts={"rules": 1.0, "length": -0.5},
        vetoes=("rules",),
        finish_reason="length",
        versions=(2, 4),
    )
    first, *rest = sample_lines("worst", one)
    assert first == (
        "worst: score +0.500; parts: rules +1.000, length -0.500; vetoed by rules; 9 tokens; "
        "cut at max_tokens; policy version 2 to 4; group 7, sample 1"
    )
    assert rest == ["  prompt", "    Why?", "  completion", "    one", "    two"]


def test_an_empty_completion_and_no_score_are_shown_as_such() -> None:
    first, *rest = sample_lines("random", sample(completion="", score=None))
    assert first == "random: 9 tokens; group 7, sample 1"
    assert rest[-1] == ""
