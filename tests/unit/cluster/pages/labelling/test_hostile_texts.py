"""Prompts and completions that want to be more than text are shown as text."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

from cluster.pages.labelling.text import LONGEST_MARKDOWN, as_html, as_written, difference

PAYLOADS = [
    "<script>window.broken = 1</script>",
    "<img src=x onerror='window.broken = 1'>",
    "<svg/onload=window.broken=1>",
    "</textarea><script>window.broken = 1</script>",
    "</pre></main></body><iframe srcdoc='<script>parent.broken=1</script>'></iframe>",
    "[click](javascript:window.broken=1)",
    "[click](data:text/html;base64,PHNjcmlwdD4=)",
    "<a href='javascript:window.broken=1'>click</a>",
    "![x](http://evil.example/track.png)",
    "![x](x 'y\" onerror=\"window.broken=1')",
    "<style>body{display:none}</style><link rel=stylesheet href=//evil.example>",
    "<form action=/leave method=post><input name=csrf><button>Submit</button></form>",
    "<base href=//evil.example><meta http-equiv=refresh content=0;url=//evil.example>",
    "{{ 7 * 7 }} {% raw %} ${7*7} #{7*7}",
    "pay \u202e001$ \u202c\u2066hidden\u2069 now\u200b\ufeff",
    "&#x202e;evil &lt;script&gt;window.broken=1&lt;/script&gt; &#0;",
    "nul \x00 bell \x07 ansi \x1b[31mred\x1b[0m \x9b2J",
    "<details open ontoggle=window.broken=1><summary>x</summary></details>",
    '[ref]: javascript:window.broken=1\n\n[ref] <http://evil.example/"onmouseover="broken=1>',
    "```html\n</code></pre><script>window.broken = 1</script>\n```",
    "x" * 30_000,
    "`" * 500 + "[" * 500 + "*" * 500 + ">" * 50,
]
OURS = {
    *("html", "head", "meta", "title", "link", "script", "body", "a", "header", "nav", "form"),
    *("input", "span", "button", "main", "div", "label", "progress", "h1", "h2", "section"),
    *("article", "details", "summary", "fieldset", "legend", "textarea", "select", "option"),
    *("p", "kbd", "ul", "li", "pre", "code", "em", "strong", "del", "ins", "b", "ol", "time"),
    *("blockquote", "br", "hr", "s"),
}


class Page(HTMLParser):
    """What a browser would make of a page: its tags, and what in them could run or load."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.amiss: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            target = (value or "").strip().lower()
            if name.startswith("on") or name in ("style", "srcdoc", "srcset"):
                self.amiss.append(f"{tag} {name}={value}")
            if name in ("href", "src", "action", "formaction") and not re.match(
                r"/|\?|#|https?://|mailto:|data:,$", target
            ):
                self.amiss.append(f"{tag} {name}={value}")
            if name in ("src", "action", "formaction") and target.startswith("http"):
                self.amiss.append(f"{tag} {name}={value}")


def test_payloads_are_shown_as_text(
    open_site: Callable[..., Any], make_item: Callable[..., Any]
) -> None:
    items = [make_item(payload, (payload, payload + " other")) for payload in PAYLOADS]
    site = open_site(items=items)
    visitor = site.visitor()
    for payload in PAYLOADS:
        path = visitor.task()
        assert site.item_at(path).messages[0]["content"] == payload
        for html in (
            visitor.get(path),
            visitor.get(f"{path}?plain=true"),
            visitor.send(path, action="compare:1-2"),
            visitor.send(path, action="edit:1"),
            visitor.send(path, 422, action="submit", rationale=payload[:4000]),
        ):
            check(html)
        visitor.send(path, action="submit", choice="tie", rationale=payload[:4000])
        assert site.store.judgements()[-1].rationale == payload[:4000].strip()
    check(visitor.get("/history"))


def check(html: str) -> None:
    page = Page(html)
    assert page.amiss == []
    assert set(page.tags) <= OURS
    assert page.tags.count("script") == 2  # those of our pages
    assert page.tags.count("form") <= 3
    fields_left_out = re.sub(r"<textarea.*?</textarea>", "", html, flags=re.DOTALL)
    assert "\u202e" not in fields_left_out
    assert "\x1b" not in fields_left_out


def test_what_is_invisible_is_shown_by_its_code_point() -> None:
    assert "⟨U+202E⟩001$" in as_html("pay \u202e001$")
    assert "⟨U+202E⟩evil" in as_html("&#x202e;evil")
    assert "⟨U+200B⟩" in as_written("a\u200bb")


def test_markdown_is_shown() -> None:
    html = as_html("# Title\n\n**b** `c`\n\n| a |\n|---|\n| 1 |\n\n3. x\n4. y\n\n[l](http://a.b)")
    for part in (
        '<p class="heading">Title</p>',
        "<strong>b</strong>",
        "<code>c</code>",
        "<td>1</td>",
        '<ol start="3">',
    ):
        assert part in html, part
    link = re.findall(r"<a [^>]*>", html)[0]
    assert 'href="http://a.b"' in link
    assert 'target="_blank"' in link
    assert "noopener" in link


def test_a_text_that_is_too_long_for_markdown_is_shown_as_written() -> None:
    html = as_html("*a* " * LONGEST_MARKDOWN)
    assert html.startswith("<pre>*a* ")


def test_a_difference_gives_both_texts() -> None:
    first, second = "The quick brown fox.\nIt ran.", "The slow brown fox!\nIt ran far."
    pieces = difference(first, second)
    assert pieces is not None
    assert "".join(p.text for p in pieces if p.kind != "second") == first
    assert "".join(p.text for p in pieces if p.kind != "first") == second
    assert [p.text for p in pieces if p.kind == "first"][:1] == ["quick"]


def test_longer_texts_are_compared_by_lines_and_the_longest_not_at_all() -> None:
    first = "".join(f"line {n}\n" for n in range(1500))
    pieces = difference(first, first.replace("line 700\n", "line seven hundred\n"))
    assert pieces is not None
    assert [p.text for p in pieces if p.kind != "both"] == ["line 700\n", "line seven hundred\n"]
    assert difference("a\n" * 3000, "b\n" * 3000) is None
