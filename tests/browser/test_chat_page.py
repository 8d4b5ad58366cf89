"""The page of `accord chat --page` in Chromium: by keyboard, without scripts, on a phone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.chat.chat_page import ChatPage, serve
from cluster.chat.voice import ChatSettings, Reply, Show
from cluster.chat.voting import open_voting
from tests.browser.test_label import HOSTILE, MARKDOWN, reads, tab, violations

__all__ = ["tab"]  # a fixture

pytestmark = pytest.mark.browser


class Writes:
    """Answers with a fixed text for each question in turn."""

    plain, positions = False, None

    def __init__(self, name: str, *texts: str) -> None:
        self.name, self.texts = name, list(texts)

    def tokens(self, messages: Sequence[Mapping[str, str]]) -> int:
        return 1

    def reply(
        self, messages: Sequence[Mapping[str, str]], settings: ChatSettings, show: Show
    ) -> Reply:
        return Reply(self.texts.pop(0), "stop", 1)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[ChatPage]:
    models = {"before": "org/before", "after": "org/after"}
    voting = open_voting(str(tmp_path / "p.db"), models, ChatSettings(), seed=0)
    voices = [
        Writes("before", MARKDOWN, HOSTILE, "same"),
        Writes("after", "A long answer. " * 150, HOSTILE + "x" * 3000, "same"),
    ]
    page = serve(voting, voices, remember=True, port=0)
    yield page
    page.stop()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_conversation_by_keyboard_fits_and_axe_finds_nothing(
    opened: ChatPage, tab: Callable[..., Any], keep_picture: Callable[..., None], scheme: str
) -> None:
    page = tab(opened.invitation, color_scheme=scheme)
    assert violations(page) == []
    page.get_by_role("button", name="I agree: begin").press("Enter")
    reads(page, "Ask two models")
    for number, key in enumerate("3b", start=1):
        assert violations(page) == []
        page.keyboard.press("w")
        page.keyboard.type(f"question {number}")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        reads(page, "Which answer is better?")
        page.click("text=Show the difference")
        reads(page, "From the first answer to the second")
        for width in (390, 1280):
            page.set_viewport_size({"width": width, "height": 844})
            keep_picture(page, f"chat-{number}-{scheme}-{width}")
            assert violations(page) == [], (number, width)
        page.keyboard.press(key)
        reads(page, "Ask two models")
    assert page.evaluate("window.broken") is None
    keep_picture(page, f"chat-earlier-{scheme}")
    first, second = opened.voting.store.judgements()
    assert first.choice == first.shown_order[1]
    assert second.choice == "both_bad"


def test_without_scripts_on_a_phone(opened: ChatPage, tab: Callable[..., Any]) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "java_script_enabled": False}
    page = tab(opened.invitation, **phone)
    page.click("text=I agree: begin")
    for said in ("Equally good", "No vote", "Go on"):
        page.fill("#question", "how?")
        page.click("text=Ask both")
        page.get_by_role("button", name=said).click()
        page.wait_for_selector("#question")
    assert [vote.choice for vote in opened.voting.store.judgements()] == ["tie"]
