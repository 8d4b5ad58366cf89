"""Makes a page of results from a template: one file without scripts or network, for light and dark
screens and for print.

Text of models and users is escaped wherever it stands, and characters that a browser would hide or
obey are shown by their code points.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from learner.evaluation.run_files import number

# Joiners shape letters in Persian, Indic scripts and emoji; they neither hide nor reorder text.
_HARMLESS = "\n\t\u200c\u200d"
_SHOWN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def render(template: str, context: Mapping[str, Any]) -> str:
    """``template``: a file of this folder; ``style`` in it is the style sheet of all pages."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(num=_num, percent=_percent, seconds=_seconds, plain=plain)
    style = Markup(_file("page.css"))
    return environment.from_string(_file(template)).render(context, style=style)


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


def _num(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "not recorded" if value is None else plain(value)
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _percent(value: Any) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{100 * value:.1f}%" if is_number else _num(value)


def _seconds(value: Any) -> str:
    value = value if not isinstance(value, int | float) else number({"s": value}, "s")
    if not isinstance(value, float):
        return _num(value)
    if value < 120:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
