"""The page on which two unnamed models answer: who may come in, asking, voting, hostile texts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from cluster.chat.chat_page import ChatPage, serve
from cluster.chat.voice import ChatSettings, Reply, Show
from cluster.chat.voting import open_voting
from tests.unit.cluster.chat.test_session import Messages

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)> [x](javascript:alert(1)) \u202e"


class Writes:
    plain, positions = False, 200

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: list[list[str]] = []

    def tokens(self, messages: Messages) -> int:
        return sum(len(message["content"]) for message in messages)

    def reply(self, messages: Messages, settings: ChatSettings, show: Show) -> Reply:
        self.seen.append([message["content"] for message in messages])
        text = f"**{self.name}** {messages[-1]['content'][:40]}"
        return Reply(text if "same" not in text else "equal", "stop", 3)


class Visitor:
    def __init__(self, page: ChatPage, voices: list[Writes]) -> None:
        self.page, self.voices = page, voices
        self.client = TestClient(page.server._server.config.app, base_url=page.server.url)
        self.join = page.invitation[len(page.server.url) - 1 :]

    def enter(self) -> str:
        return self.client.post(self.join).text

    def send(self, path: str, status: int = 200, **fields: str) -> str:
        shown = self.client.get("/").text
        forms = re.findall(r"<form[^>]*>.*?</form>", shown, re.DOTALL)
        form = next((one for one in forms if f'action="{path}"' in one), "")
        hidden = dict(re.findall(r'<input type="hidden" name="([\w-]+)" value="([^"]*)"', form))
        answer = self.client.post(path, data={**hidden, **fields})
        assert answer.status_code == status, answer.text
        return answer.text


@pytest.fixture
def visitor(tmp_path: Path) -> Iterator[Visitor]:
    models = {"before": "org/before", "after": "org/after"}
    voting = open_voting(str(tmp_path / "p.db"), models, ChatSettings(), seed=0)
    voices = [Writes("before"), Writes("after")]
    page = serve(voting, voices, remember=True, port=0)
    yield Visitor(page, voices)
    page.stop()


def test_nobody_comes_in_without_the_invitation_and_it_works_once(visitor: Visitor) -> None:
    assert visitor.client.get("/").status_code == 401
    assert "Your questions" in visitor.client.get(visitor.join).text  # looking does not use it up
    assert "Ask two models" in visitor.enter()
    assert visitor.client.post(visitor.join).status_code == 410
    csp = visitor.client.get("/").headers["content-security-policy"]
    assert "script-src 'self'" in csp


def test_a_vote_is_blind_and_kept_with_who_wrote_what(visitor: Visitor) -> None:
    visitor.enter()
    shown = visitor.send("/ask", question="how?")
    first = re.findall(r"<strong>(before|after)</strong>", shown)[0]
    assert "org/" not in shown
    again = visitor.send("/vote", choice="first")
    assert "the answer that goes on (First is better)" in again
    ((item, vote),) = visitor.page.voting.store.judged()
    best = item.completions[vote.ranks.index(1)]
    assert best.text == f"**{first}** how?"
    assert (best.policy_version, vote.source) == (f"org/{first}", "person")
    assert vote.annotator_id.startswith("annotator-")
    assert vote.consent
    visitor.send("/ask", question="and then?")
    assert [voice.seen[-1] for voice in visitor.voices] == [["how?", best.text, "and then?"]] * 2
    visitor.send("/vote", choice="both_bad")
    assert [one.choice for _, one in visitor.page.voting.store.judged()][1] == "both_bad"
    assert "both bad 1" in visitor.page.voting.summary()
    visitor.send("/new")
    assert "how?" not in visitor.client.get("/").text


def test_forms_that_come_twice_or_from_elsewhere_change_nothing(visitor: Visitor) -> None:
    visitor.enter()
    visitor.send("/ask", question="one")
    number = re.findall(r'name="number" value="(\w+)"', visitor.client.get("/").text)[0]
    csrf = re.findall(r'name="csrf" value="(\w+)"', visitor.client.get("/").text)[0]
    form = {"csrf": csrf, "number": number, "choice": "tie"}
    visitor.client.post("/ask", data={"csrf": csrf, "question": "two"})  # the first is still open
    for _ in range(2):
        assert visitor.client.post("/vote", data=form).status_code == 200
    assert len(visitor.page.voting.store.judgements(history=True)) == 1
    assert len(visitor.voices[0].seen) == 1
    for bad, headers in (({**form, "csrf": "x"}, {}), (form, {"sec-fetch-site": "cross-site"})):
        assert visitor.client.post("/vote", data=bad, headers=headers).status_code == 403


def test_what_cannot_be_asked_and_what_needs_no_vote(visitor: Visitor) -> None:
    visitor.enter()
    assert "Write a question." in visitor.send("/ask", 422, question="  ")
    assert "too long for one of the models" in visitor.send("/ask", 422, question="x" * 300)
    assert "characters" in visitor.send("/ask", 422, question="x" * 20_001)
    shown = visitor.send("/ask", question="same")
    assert "Both wrote the same." in shown
    assert "First is better" not in shown
    visitor.send("/vote", choice="")
    assert visitor.page.voting.store.items() == []


def test_hostile_texts_are_shown_as_text(visitor: Visitor) -> None:
    visitor.enter()
    visitor.send("/ask", question=HOSTILE)
    shown: Any = visitor.client.get("/?compare=true").text
    for bad in ("<script>alert", "<img", 'href="javascript', "\u202e"):
        assert bad not in shown
    assert "&lt;script&gt;" in shown
    assert "From the first answer to the second" in shown
