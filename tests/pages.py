"""What a page of README or docs/ shows: code blocks, commands, and files to be written."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

SEPARATORS = {"&&", "||", ";", "|", "&"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.S | re.M)


def commands(block: str) -> Iterator[list[str]]:
    """Words of each command; continued lines are joined, comments and NAME=value before it cut."""
    for line in block.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), ";"]:
            if word not in SEPARATORS:
                words.append(word)
                continue
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words:
                yield words
            words = []


def shown_files(page: Path) -> dict[str, str]:
    """Files that a page shows: a code block below a line that ends in the name and a colon."""
    text = page.read_text("utf-8")
    found = re.findall(r"`([\w.-]+\.\w+)`:\n\n```\w+\n(.*?)^```", text, re.S | re.M)
    return dict(found)
