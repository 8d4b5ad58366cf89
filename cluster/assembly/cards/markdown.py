"""Cards are Markdown with a YAML head, as Hugging Face reads them. Text of others stays text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from learner.evaluation.labels_panel import Table
from learner.evaluation.page import visible

UNKNOWN = "unknown"  # Hugging Face's word for a licence that is not known
SPDX = ("apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0")
"""Licences that Hugging Face knows by these names; others are ``other``."""


def head(entries: Mapping[str, Any]) -> list[str]:
    """The YAML head. Every value is written as JSON, which YAML takes as it is."""
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items()]
    return ["---", *lines, "---", ""]


def cell(text: str) -> str:
    """One line that a table keeps whole and in which nothing is a tag or a link."""
    plain = visible(text).replace("\\", "\\\\").replace("\n", " ")
    for char, written in (("|", "\\|"), ("<", "&lt;"), ("[", "\\["), ("`", "\\`"), ("*", "\\*")):
        plain = plain.replace(char, written)
    return plain


def table(found: Table) -> list[str]:
    """Without a head where the columns need none."""
    rows = [found.header, tuple("---" for _ in found.header), *found.rows]
    lines = [
        "| " + " | ".join(c if at == 1 else cell(c) for c in row) + " |"
        for at, row in enumerate(rows)
    ]
    return [f"**{cell(found.caption)}**", "", *lines, ""]


def section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""] if lines else []


def bullets(texts: Sequence[str]) -> list[str]:
    return [f"- {cell(text)}" for text in texts]


def code(text: str) -> list[str]:
    """A block that its own content cannot end."""
    fence = "```"
    while fence in text:
        fence += "`"
    return [fence, visible(text).rstrip("\n"), fence]


def license_of(names: Sequence[str]) -> str:
    """One name for the head: that of all, ``other`` for several, ``unknown`` if one is not
    known."""
    known = {name.strip().lower() for name in names}
    if not known or known & {"", UNKNOWN, "not known"}:
        return UNKNOWN
    (first, *others) = sorted(known)
    return first if not others and first in SPDX else "other"
