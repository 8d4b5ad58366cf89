"""How completions are shown: as safe Markdown, as written, and the difference of two of them.

Two walls stand between a completion and the page. The Markdown renderer takes no HTML and no
images: it escapes them. The sanitizer then keeps a short list of tags and drops everything else.
"""

from __future__ import annotations

import difflib
import functools
import re
from dataclasses import dataclass
from typing import Literal

import nh3
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup, escape

from learner.evaluation.page import visible

# A hostile text can make the renderer take seconds. Longer texts are shown as they were written.
LONGEST_MARKDOWN = 20_000  # characters
LONGEST_DIFFERENCE = 2_000  # words of each side; the comparison takes the product of both
COLLAPSED_FROM = 1_500  # characters; longer completions can be folded

TAGS = {
    *("p", "br", "hr", "em", "strong", "s", "blockquote", "code", "pre", "a"),
    *("ul", "ol", "li", "table", "thead", "tbody", "tr", "th", "td"),
}
ATTRIBUTES = {"a": {"href"}, "ol": {"start"}}
SCHEMES = ("http", "https", "mailto")


def _renderer() -> MarkdownIt:
    made = MarkdownIt("commonmark", {"html": False})
    made.enable(["table", "strikethrough"]).disable("image")
    made.core.ruler.push("headings", _headings_as_text)
    # A relative link would lead to a page of ours.
    made.validateLink = lambda url: url.lower().partition(":")[0] in SCHEMES  # type: ignore[method-assign]
    return made


def _headings_as_text(state: object) -> None:
    """A heading of a completion is no heading of our page: a screen reader would jump to it."""
    tokens: list[Token] = state.tokens  # type: ignore[attr-defined]
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = "p"
            token.attrs = {"class": "heading"} if token.nesting == 1 else {}


_MARKDOWN = _renderer()


@functools.lru_cache(maxsize=512)
def as_html(text: str) -> Markup:
    """``text`` as Markdown. Links open a new tab, which gets no reference to ours."""
    shown = visible(text.replace("\r\n", "\n"))
    if len(shown) > LONGEST_MARKDOWN:
        return as_written(text)
    cleaned = nh3.clean(
        visible(_MARKDOWN.render(shown)),  # what an entity such as &#x202e; has become
        tags=TAGS,
        attributes=ATTRIBUTES,
        allowed_classes={"p": {"heading"}},
        url_schemes=set(SCHEMES),
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )
    return Markup(cleaned)


def as_written(text: str) -> Markup:
    """``text`` character by character."""
    return Markup("<pre>{}</pre>").format(escape(visible(text)))


@dataclass(frozen=True, slots=True)
class Piece:
    """``kind``: the words stand in both texts, in the first only, or in the second only."""

    kind: Literal["both", "first", "second"]
    text: str


@functools.lru_cache(maxsize=64)
def difference(first: str, second: str) -> tuple[Piece, ...] | None:
    """What must be removed from and added to ``first`` to get ``second``, word by word, or line by
    line for longer texts. None where the texts are too long to compare."""
    for cut in (r"\s+|\w+|[^\w\s]", r"[^\n]*\n|[^\n]+"):
        left, right = re.findall(cut, first), re.findall(cut, second)
        if max(len(left), len(right)) <= LONGEST_DIFFERENCE:
            return tuple(_pieces(left, right))
    return None


def _pieces(left: list[str], right: list[str]) -> list[Piece]:
    found = []
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
    for operation, i, j, m, n in matcher.get_opcodes():
        if operation == "equal":
            found.append(Piece("both", "".join(left[i:j])))
            continue
        if i < j:
            found.append(Piece("first", "".join(left[i:j])))
        if m < n:
            found.append(Piece("second", "".join(right[m:n])))
    return found
