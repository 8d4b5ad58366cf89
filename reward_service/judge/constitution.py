"""A constitution: principles in a Markdown or TOML file, and which of them is used where."""

from __future__ import annotations

import hashlib
import json
import random
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.contracts.errors import UserError

LIST_ITEM = re.compile(r"\s{0,3}(?:[-*+]|\d{1,4}[.)])\s+(.*\S)\s*")


@dataclass(frozen=True, slots=True)
class Constitution:
    principles: tuple[str, ...]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.principles).encode()).hexdigest()

    def drawn(self, name: str, seed: int, count: int = 1) -> tuple[str, ...]:
        """``count`` principles for what is called ``name``, none twice while there are others. The
        same for the same seed, name and constitution, whatever else is drawn."""
        order = list(self.principles)
        random.Random(f"constitution/{seed}/{name}").shuffle(order)
        return tuple(order[n % len(order)] for n in range(count))


def read_constitution(path: str) -> Constitution:
    """Raises UserError for a file that cannot be read or holds no principle."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(
            f"cannot be read: {problem}", where=path, fix="give a Markdown or TOML file in UTF-8"
        ) from None
    found = _of_toml(text, path) if file.suffix == ".toml" else _of_markdown(text)
    principles = tuple(dict.fromkeys(" ".join(one.split()) for one in found if one.strip()))
    if not principles:
        raise UserError(
            "holds no principle",
            where=path,
            fix="write each principle as a list item (`- Choose ...`), or principles = [...] in "
            "a TOML file",
        )
    return Constitution(principles)


def _of_toml(text: str, path: str) -> Sequence[str]:
    try:
        found = tomllib.loads(text).get("principles", [])
    except tomllib.TOMLDecodeError as problem:
        raise UserError(f"not valid TOML: {problem}", where=path, fix="correct it") from None
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise UserError(
            "principles is not a list of texts", where=path, fix='write principles = ["...", "..."]'
        )
    return found


def _of_markdown(text: str) -> list[str]:
    """List items; indented lines below one belong to it. All other text explains."""
    found: list[str] = []
    open_item = False
    for line in text.splitlines():
        item = LIST_ITEM.fullmatch(line)
        if item:
            found.append(item[1])
            open_item = True
        elif open_item and line.startswith("  ") and line.strip():
            found[-1] += " " + line.strip()
        else:
            open_item = False
    return found
