"""Votes on two unnamed models, at the terminal: blind, stored with their provenance, once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.chat.ballot import Ballot
from cluster.chat.session import ChatSession
from cluster.chat.voice import ChatSettings
from cluster.chat.voting import Voting, open_voting, own_pseudonym
from cluster.contracts.errors import UserError
from reward_service.preferences.store import PreferenceStore
from tests.unit.cluster.chat.test_session import Messages, Parrot


class Says(Parrot):
    """Answers with its name and the number of messages it was given."""

    def reply(self, messages: Messages, settings: ChatSettings, show: Any) -> Any:
        return super().reply(
            [*messages[:-1], {"role": "user", "content": f"{self.name} {messages[-1]['content']}"}],
            settings,
            show,
        )


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    found = {}
    for name in ("before", "after"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(f'"{name}"')
        found[name] = str(folder)
    return found


@pytest.fixture
def voting(tmp_path: Path, models: dict[str, str]) -> Voting:
    return open_voting(str(tmp_path / "p.db"), models, ChatSettings(temperature=0.5), seed=3)


def talk(voting: Voting, *lines: str, voices: Any = None, **more: Any) -> list[str]:
    shown: list[str] = []
    waiting: Iterator[str] = iter(lines)

    def read(prompt: str) -> str:
        line = next(waiting, None)
        if line is None:
            raise EOFError
        return line

    ChatSession(
        voices or [Says("before"), Says("after")], voting.settings, read, shown.append,
        interactive=False, ballot=Ballot(voting, "chat-me"), **more,
    ).run()  # fmt: skip
    return "".join(shown).splitlines()


def letter_of(lines: list[str], name: str) -> str:
    return next(line[0] for line in lines if f":{name} " in line)


def test_a_vote_keeps_who_wrote_what_and_how(voting: Voting, models: dict[str, str]) -> None:
    lines = talk(voting, "hello", "a")
    assert {line[:3] for line in lines if ":hello" in line or " hello" in line} == {"a: ", "b: "}
    ((item, vote),) = voting.store.judged()
    assert item.messages == ({"role": "user", "content": "hello"},)
    assert (vote.annotator_id, vote.source, vote.answer) == ("chat-me", "person", "ranking")
    assert vote.consent == voting.consent
    assert voting.people.has_agreed("chat-me", f"consent {voting.consent}")
    for one in item.completions:
        name = "before" if "before" in one.text else "after"
        assert one.run == models[name]
        assert one.policy_version == voting.authors[name].version
        assert one.policy_version.startswith("sha256:")
        assert one.sampling == {"max_tokens": 256, "temperature": 0.5, "seed": 3}
    best = item.completions[vote.ranks.index(1)]
    assert letter_of(lines, "before" if "before" in best.text else "after") == "a"
    assert vote.choice == vote.shown_order[0]


@pytest.mark.parametrize(("line", "answer"), [("t", "tie"), ("n", "both_bad"), ("", None)])
def test_ties_both_bad_and_no_vote(voting: Voting, line: str, answer: str | None) -> None:
    talk(voting, "hello", "what?", line)
    assert [vote.choice for _, vote in voting.store.judged()] == ([answer] if answer else [])


def test_the_order_is_drawn_and_the_models_are_named_at_the_end_only(voting: Voting) -> None:
    assert len({voting.order() for _ in range(64)}) == 2
    lines = talk(voting, "one", "a", "two", "b", "three", "n", "/show")
    assert [line[:3] for line in lines if line.startswith(("a: ", "b: "))] == ["a: ", "b: "] * 3
    assert not [line for line in lines if line.startswith(("before", "after"))]
    before, after = voting.tally["before"], voting.tally["after"]
    assert before + after == 2
    summary = voting.summary()
    assert f"before ({voting.authors['before'].path}) {before}, after" in summary
    assert summary.endswith(f"{after}, ties 0, both bad 1")


def test_the_preferred_answer_goes_on_for_both(voting: Voting) -> None:
    seen: list[Any] = []

    class Listens(Says):
        def reply(self, messages: Messages, settings: ChatSettings, show: Any) -> Any:
            seen.append([message["content"] for message in messages])
            return super().reply(messages, settings, show)

    talk(voting, "one", "b", "two", "t", voices=[Listens("before"), Listens("after")])
    (first, vote), (second, _) = voting.store.judged()
    better = first.completions[vote.ranks.index(1)].text
    assert seen[2] == seen[3] == ["one", better, "two"]
    assert [message["content"] for message in second.messages] == ["one", better, "two"]


def test_equal_answers_are_not_asked_about(voting: Voting) -> None:
    lines = talk(voting, "one", voices=[Parrot("before"), Parrot("after")])
    assert "(both wrote the same; no vote)" in "\n".join(lines)
    assert voting.store.items() == []


def test_a_vote_that_is_sent_twice_is_stored_once(voting: Voting, tmp_path: Path) -> None:
    from cluster.chat.voting import Vote

    vote = Vote(
        number="1", messages=[{"role": "user", "content": "q"}],
        answers={"before": "x", "after": "y"}, shown=("after", "before"), choice="first",
    )  # fmt: skip
    for _ in range(2):
        voting.cast("chat-me", vote)
    ((item, stored),) = PreferenceStore(tmp_path / "p.db").judged()
    assert item.completions[stored.ranks.index(1)].text == "y"
    assert voting.tally == {"after": 1}


def test_one_model_alone_has_no_vote(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs two models"):
        open_voting(str(tmp_path / "p.db"), {"model": "m"}, ChatSettings(), seed=0)


def test_a_pseudonym_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    name = own_pseudonym()
    assert name.startswith("chat-")
    assert own_pseudonym() == name
    assert (tmp_path / "accord" / "annotator").stat().st_mode & 0o077 == 0
