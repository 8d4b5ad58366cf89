"""Makes a page of results from a template: one file without scripts or network, for light and dark
screens and for print.

Text of models and users is escaped wherever it stands, and characters that a browser would hide or
obey are shown by their code points.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from importlib import resources
from typing import Any

from jinja2 import BaseLoader, Environment, StrictUndefined
from markupsafe import Markup

from learner.evaluation.run_files import number

DEEPEST = 4  # levels of a value that are written out
# Joiners shape letters in Persian, Indic scripts and emoji; they neither hide nor reorder text.
_HARMLESS = "\n\t\u200c\u200d"
_SHOWN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def render(template: str, context: Mapping[str, Any]) -> str:
    """``template``: a file of this folder; ``style`` in it is the style sheet of all pages."""
    style = Markup(style_sheet())
    return environment().from_string(_file(template)).render(context, style=style)


def environment(loader: BaseLoader | None = None) -> Environment:
    """For templates of any page: text is escaped and what is invisible in it shown."""
    made = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(num=number_text, percent=percent_text, seconds=_seconds, plain=plain)
    return made


def style_sheet() -> str:
    return _file("page.css")


def visible(text: str) -> str:
    """Control, direction and invisible characters as their code points; the rest as it is."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        f"⟨U+{ord(c):04X}⟩" if c not in _HARMLESS and unicodedata.category(c) in _SHOWN else c
        for c in text
    )


def _finalize(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _file(name: str) -> str:
    return resources.files("learner.evaluation").joinpath(name).read_text("utf-8")


def number_text(value: Any) -> str:
    """Three digits of a fraction; counts as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "not recorded" if value is None else plain(value)
    if isinstance(value, int):
        return str(value)
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def percent_text(value: Any) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{100 * value:.1f}%" if is_number else number_text(value)


def _seconds(value: Any) -> str:
    value = value if not isinstance(value, int | float) else number({"s": value}, "s")
    if not isinstance(value, float):
        return number_text(value)
    if value < 120:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def plain(value: Any, depth: int = 0) -> str:
    """Any JSON value as words: no braces and quotes in a table's cell."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, int | float):
        return number_text(value)
    if depth == DEEPEST or not value:
        return "…" if value else "none"
    if isinstance(value, Mapping):
        parts = [(str(key).replace("_", " "), entry) for key, entry in value.items()]
        return ", ".join(
            f"{key} ({plain(entry, depth + 1)})"
            if isinstance(entry, Mapping)
            else f"{key} {plain(entry, depth + 1)}"
            for key, entry in parts
        )
    if isinstance(value, list | tuple):
        return ", ".join(plain(entry, depth + 1) for entry in value)
    return str(value)
