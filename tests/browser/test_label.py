"""The labelling pages in Chromium: by keyboard alone, two at once, offline, without scripts, on a
phone and on a desktop, light and dark, and under axe."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.contracts.config.label import LabelPageConfig
from cluster.pages.access import Access
from cluster.pages.labelling.desk import Desk
from cluster.pages.labelling.label_site import label_app, rules_of
from cluster.pages.server import PageServer
from reward_service.preferences.labelling import Labelling
from reward_service.preferences.people import People
from reward_service.preferences.records import Candidate, Item, derived_id
from reward_service.preferences.store import PreferenceStore

pytestmark = pytest.mark.browser

DEADLINE_MS = 60_000
MARKDOWN = (
    "You can do it like this:\n\n1. Open **Settings**\n2. Choose *Security*\n\n"
    "```python\nprint('hello')\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n"
    "See [the manual](https://example.org/manual)."
)
HOSTILE = (
    "<script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"
    "<svg/onload=window.broken=1> [x](javascript:window.broken=1) ![t](http://evil.example/t.png) "
    "</textarea></pre></main><iframe srcdoc='<script>parent.broken=1</script>'></iframe> "
    "<style>body{display:none}</style> {{ 7 * 7 }} pay \u202e001$ \u2066hidden\u2069"
)


def item(name: str, *texts: str) -> Item:
    return Item(
        id=derived_id(name),
        messages=({"role": "user", "content": name},),
        completions=tuple(Candidate(text=text) for text in texts),
        source="test",
        license="unknown",
        created_at="2027-01-01T00:00:00+00:00",
    )


class Site:
    """Pages over a store of ``items``, in this process."""

    def __init__(self, folder: Path, *items: Item) -> None:
        self.store = PreferenceStore(folder / "preferences.db")
        self.store.add_items(items)
        self.people = People(self.store)
        desk = Desk(Labelling(self.store), self.people, rules_of(LabelPageConfig(), self.people))
        self.server = PageServer(label_app(desk), Access(asks_token=False), "127.0.0.1", 0)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    opened: list[Site] = []

    def make(*items: Item) -> Site:
        opened.append(Site(tmp_path, *items))
        return opened[-1]

    yield make
    for one in opened:
        one.server.stop()


@pytest.fixture
def tab(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page in a browser of its own. It may not complain, ask, or load what is foreign."""
    contexts, amiss = [], []

    def make(url: str, **options: Any) -> Any:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 844}, **options})
        context.set_default_timeout(DEADLINE_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: amiss.append(f"error: {error}"))
        page.on("dialog", lambda dialog: amiss.append(f"dialog: {dialog.message}"))
        page.on(
            "request", lambda one: one.url.startswith((origin, "data:")) or amiss.append(one.url)
        )
        origin = url[: url.index("/", 8)]
        page.goto(url)
        return page

    yield make
    assert amiss == []
    for context in contexts:
        context.close()


def enter(page: Any, site: Site) -> Any:
    """Signs ``page`` in and agrees to the texts."""
    page.goto(f"{site.server.url}join/{site.people.invite()}")
    page.get_by_role("button", name="Begin").click()
    page.check("input[name=agree]")
    page.get_by_role("button", name="Begin").click()
    page.wait_for_url("**/task/*")
    return page


def violations(page: Any) -> list[str]:
    """What axe finds wrong with the page, and whether it scrolls sideways."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    wider = page.evaluate(
        "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
    shown = [f"{one['id']}: {[n['html'][:200] for n in one['nodes']][:3]}" for one in found]
    return shown + ([f"{wider} pixels too wide"] if wider > 0 else [])


def focused(page: Any, what: str) -> Any:
    return page.evaluate(f"document.activeElement.{what}")


def tab_to(page: Any, what: str, value: str) -> None:
    for _ in range(60):
        page.keyboard.press("Tab")
        if focused(page, what) == value:
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
            return
    raise AssertionError(f"the keyboard does not reach {value}")


def reads(page: Any, text: str) -> None:
    """Waits for ``text``, and for the script of its page: before that, keys do nothing."""
    page.wait_for_selector(f"text={text}")
    page.wait_for_selector("html.scripted", state="attached")


def submit(page: Any) -> None:
    """Enter, and the next page."""
    before = page.url
    page.keyboard.press("Enter")
    page.wait_for_url(lambda url: url != before)


def test_the_real_command_and_a_whole_task_by_keyboard_alone(
    tab: Callable[..., Any], tmp_path: Path, repo_root: Path, keep_picture: Callable[..., None]
) -> None:
    rows = [{"prompt": f"question {n}", "completions": [MARKDOWN, f"short {n}"]} for n in range(3)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = tmp_path / "p.db"
    files = f"data.files={json.dumps([str(tmp_path / 'c.jsonl')])}"
    process = subprocess.Popen(
        [sys.executable, "launch.py", "label", str(store), files, "server.port=0"],
        cwd=repo_root,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    try:
        page = tab(address)
        tab_to(page, "textContent", "Begin")
        page.keyboard.press("Enter")
        page.wait_for_url("**/admin")
        assert violations(page) == []
        tab_to(page, "textContent", "Labelling")
        page.keyboard.press("Enter")
        page.wait_for_url("**/welcome")
        assert violations(page) == []
        tab_to(page, "name", "agree")
        page.keyboard.press("Space")
        submit(page)
        reads(page, "Which completion is better?")
        first = page.url
        page.keyboard.press("7")
        page.keyboard.press("w")
        page.keyboard.type("shorter")
        page.keyboard.press("Escape")
        submit(page)
        reads(page, "Saved: the second is much better.")
        page.keyboard.press("u")
        page.wait_for_url(first)
        assert page.input_value("#rationale") == "shorter"
        assert page.is_checked("input[value=second-3]")
        page.keyboard.press("d")
        page.wait_for_selector(".difference")
        keep_picture(page, "label-difference")
        assert violations(page) == []
        page.keyboard.press("e")
        page.keyboard.type("my own words")
        page.keyboard.press("Control+Enter")
        reads(page, "Saved: the second is much better, and edited.")
        page.keyboard.press("Enter")
        page.wait_for_selector("[role=alert]")
        assert violations(page) == []
        page.keyboard.press("b")
        submit(page)
        reads(page, "Saved: both are bad.")
        page.keyboard.press("s")
        reads(page, "Nothing is left for you")
        assert violations(page) == []
        page.goto(address[: address.index("/join")] + "/history")
        keep_picture(page, "label-history")
        assert violations(page) == []
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    said = sorted((one.choice, one.demonstration) for one in PreferenceStore(store).judgements())
    assert [choice for choice, _ in said if choice not in "ab"] == ["both_bad", "skip"]
    assert [words for _, words in said if words] == ["my own words"]


def test_two_annotators_never_have_the_same_item(
    site: Callable[..., Site], tab: Callable[..., Any]
) -> None:
    opened = site(*(item(f"question {n}", "one", "two") for n in range(6)))
    pages = [enter(tab(opened.server.url), opened) for _ in range(2)]
    for _ in range(3):
        assert pages[0].url != pages[1].url
        for page in pages:
            page.keyboard.press("4")
            submit(page)
    for page in pages:
        reads(page, "Nothing is left for you")
    labels = opened.store.judgements()
    assert len({one.item_id for one in labels}) == len(labels) == 6
    assert {one.shown_order for one in labels} <= {"ab", "ba"}


def test_without_scripts_on_a_phone(
    site: Callable[..., Site], tab: Callable[..., Any], keep_picture: Callable[..., None]
) -> None:
    opened = site(item("pair", MARKDOWN, "short"), item("order", "one", "two", "three", "four"))
    phone = {"viewport": {"width": 390, "height": 844}, "java_script_enabled": False}
    page = enter(tab(opened.server.url, **phone), opened)
    assert not page.is_visible("text=Keys")
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.locator("input[name=choice]:focus").count():
            break
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    keep_picture(page, "label-no-scripts")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Put the completions in order")
    for place, position in enumerate((2, 1, 4, 3), start=1):
        page.check(f"input[name=rank-{position}][value='{place}']")
    page.get_by_role("button", name="Submit").click()
    page.wait_for_selector("text=Nothing is left for you")
    page.click("text=Undo")
    page.wait_for_selector("text=Put the completions in order")
    assert page.is_checked("input[name=rank-2][value='1']")
    (label,) = opened.store.judgements()
    assert label.choice in "ab"
    assert label.strength == 3


def test_a_lost_connection_loses_and_doubles_nothing(
    site: Callable[..., Site], tab: Callable[..., Any]
) -> None:
    opened = site(*(item(f"question {n}", "one", "two") for n in range(3)))
    page = enter(tab(opened.server.url), opened)
    first = page.url
    page.context.set_offline(True)
    page.keyboard.press("1")
    page.fill("#rationale", "kept")
    page.locator("#rationale").blur()
    page.keyboard.press("Enter")
    reads(page, "Not sent yet")
    assert opened.store.judgements() == []
    assert "kept" in page.evaluate("JSON.stringify(localStorage)")
    page.context.set_offline(False)
    page.wait_for_url(lambda url: url != first)
    (label,) = opened.store.judgements()
    assert (label.rationale, label.strength) == ("kept", 3)

    lost = []

    def lose_the_answer(route: Any) -> None:
        if lost or "action=submit" not in (route.request.post_data or ""):
            route.continue_()
            return
        lost.append(route.fetch().status)  # it arrives, but its answer does not
        route.abort()

    page.route("**/task/*", lose_the_answer)
    second = page.url
    page.keyboard.press("4")
    page.keyboard.press("Enter")
    page.wait_for_url(lambda url: url != second)
    assert lost == [200]
    assert len(opened.store.judgements(history=True)) == 2
    assert page.evaluate("Object.keys(localStorage).length") == 0


def test_what_was_entered_survives_a_reload_without_a_server(
    site: Callable[..., Site], tab: Callable[..., Any]
) -> None:
    opened = site(item("question", "one", "two"))
    page = enter(tab(opened.server.url), opened)
    page.route("**/task/*", lambda r: r.abort() if r.request.method == "POST" else r.continue_())
    page.keyboard.press("6")
    page.fill("#rationale", "half a thought")
    reads(page, "What you enter is kept in this browser")
    page.reload()
    assert page.input_value("#rationale") == "half a thought"
    assert page.is_checked("input[value=second-2]")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_and_axe_finds_nothing(
    site: Callable[..., Site],
    tab: Callable[..., Any],
    keep_picture: Callable[..., None],
    scheme: str,
) -> None:
    opened = site(
        item("# How do I reset my password?", MARKDOWN, "A long answer. " * 150),
        item("Put these in order", "one " * 30, MARKDOWN, "three", "four " * 60),
        item("hostile " + HOSTILE, HOSTILE, HOSTILE + "x" * 3000),
    )
    page = enter(tab(opened.server.url, color_scheme=scheme), opened)
    for name in ("pair", "ranking", "hostile"):
        for width in (390, 1280):
            page.set_viewport_size({"width": width, "height": 844})
            keep_picture(page, f"label-{name}-{scheme}-{width}")
            assert violations(page) == [], (name, width)
        assert page.evaluate("window.broken") is None
        assert ("⟨U+202E⟩001$" in page.inner_text("main")) == (name == "hostile")
        for key in "1234" if name == "ranking" else "2":
            page.keyboard.press(key)
        submit(page)
    page.goto(f"{opened.server.url}history")
    assert re.search("places [1-4], [1-4], [1-4], [1-4]", page.inner_text("main"))
    keep_picture(page, f"label-history-{scheme}")
    assert violations(page) == []


def test_an_admin_looks_at_what_was_set_aside_and_puts_it_back(
    site: Callable[..., Site], tab: Callable[..., Any], keep_picture: Callable[..., None]
) -> None:
    opened = site(item("odd " + HOSTILE, MARKDOWN, HOSTILE))
    annotator = enter(tab(opened.server.url), opened)
    annotator.keyboard.press("s")
    reads(annotator, "Nothing is left for you")
    admin = tab(f"{opened.server.url}join/{opened.people.invite('admin')}")
    admin.get_by_role("button", name="Begin").click()
    admin.get_by_role("button", name="Make an invitation").click()
    admin.click("text=Invitations so far")
    for width in (390, 1280):
        admin.set_viewport_size({"width": width, "height": 844})
        keep_picture(admin, f"label-admin-{width}")
        assert violations(admin) == [], width
    admin.click("ol.history a")
    admin.wait_for_url("**/admin/item/*")
    for width in (390, 1280):
        admin.set_viewport_size({"width": width, "height": 844})
        keep_picture(admin, f"label-item-{width}")
        assert violations(admin) == [], width
    assert admin.evaluate("window.broken") is None
    admin.get_by_role("button", name="Put back").click()
    admin.wait_for_url("**/admin*")
    admin.click("text=Invitations so far")
    admin.get_by_role("button", name="Withdraw").click()
    admin.click("text=Invitations so far")
    assert admin.locator("td", has_text="withdrawn").count() == 1
    annotator.reload()
    reads(annotator, "Which completion is better?")
