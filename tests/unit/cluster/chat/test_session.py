"""A chat without a terminal and without a model: commands, memory, Ctrl-C, scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from cluster.chat.session import HELP, ChatSession
from cluster.chat.voice import ChatSettings, Reply, Show
from cluster.contracts.errors import UserError

Messages = Sequence[Mapping[str, str]]


class Parrot:
    """Answers with what it was given: one letter per role, then the last message."""

    positions: int | None = None

    def __init__(self, name: str = "after", plain: bool = False) -> None:
        self.name, self.plain = name, plain
        self.interrupt = False
        self.fail = False

    def tokens(self, messages: Messages) -> int:
        return sum(len(message["content"]) for message in messages)

    def reply(self, messages: Messages, settings: ChatSettings, show: Show) -> Reply:
        if self.fail:
            raise UserError("the template refuses", where="m")
        roles = "".join(message["role"][0] for message in messages)
        text = f"{roles}:{messages[-1]['content']}"
        show(text[:2])
        if self.interrupt:
            return Reply(text[:2], "interrupted", 1)
        show(text[2:])
        return Reply(text, "length" if len(text) > settings.max_tokens else "stop", len(text))


def talk(*lines: Any, voices: Sequence[Any] = (), **more: Any) -> tuple[list[str], ChatSession]:
    """What is shown for the lines; a line may be an exception that reading it raises."""
    shown: list[str] = []
    waiting: Iterator[Any] = iter(lines)

    def read(prompt: str) -> str:
        line = next(waiting, EOFError)
        if not isinstance(line, str):
            raise line
        return line

    session = ChatSession(
        voices or [Parrot()], ChatSettings(), read, shown.append,
        **{"interactive": False, **more},
    )  # fmt: skip
    session.run()
    return "".join(shown).splitlines(), session


def test_the_model_sees_the_conversation_so_far() -> None:
    assert talk("one", "two", "", "three")[0] == ["u:one", "uau:two", "uauau:three"]


def test_without_memory_each_question_stands_alone() -> None:
    assert talk("one", "two", remember=False)[0] == ["u:one", "u:two"]
    assert talk("one", "two", voices=[Parrot(plain=True)])[0] == ["t:one", "t:two"]


def test_reset_undo_retry_and_system() -> None:
    assert talk("one", "/undo", "two")[0] == ["u:one", "(forgotten: one)", "u:two"]
    assert talk("one", "/reset", "two")[0] == ["u:one", "(forgotten)", "u:two"]
    assert talk("one", "/retry")[0] == ["u:one", "u:one"]
    assert talk("/undo", "/retry")[0] == ["(nothing to undo)", "(no question yet)"]
    lines, session = talk("one", "/system Be brief.", "two", "/reset", "three", "/system", "four")
    assert lines[1:] == [
        "(system message set)", "su:two", "(forgotten)", "su:three",
        "(no system message)", "u:four",
    ]  # fmt: skip
    assert session.conversation.system is None


def test_every_command_of_the_help_is_known() -> None:
    for command in HELP:
        lines, _ = talk(command.partition(" ")[0])
        assert not [line for line in lines if "no command" in line]
    assert talk("/help")[0][0].split()[0] == "/help"
    assert talk("/hlep")[0] == ["(no command /hlep; /help lists them)"]
    assert talk("/quit", "one")[0] == []
    assert talk(" /not a command")[0] == ["u:/not a command"]


def test_settings_change_and_nonsense_is_refused() -> None:
    lines, _ = talk("/set max_tokens 9", "/set temperature 0", "/set temperature nan", "/set x 1")
    assert lines[:2] == [
        "(max_tokens 9, temperature 0.7)", "(max_tokens 9, temperature 0)",
    ]  # fmt: skip
    assert all(line.startswith("(try: /set") for line in lines[2:])


def test_a_stopped_answer_is_kept_as_far_as_it_went_and_a_second_ctrl_c_leaves() -> None:
    voice = Parrot()
    voice.interrupt = True
    lines, session = talk("one", KeyboardInterrupt, "two", voices=[voice])
    assert lines == ["u:", "(stopped)", ""]
    assert [turn.answers for turn in session.conversation.turns] == [{"after": "u:"}]


def test_at_the_prompt_ctrl_c_leaves_only_when_pressed_twice_in_a_row() -> None:
    lines, _ = talk(KeyboardInterrupt, "one", KeyboardInterrupt, KeyboardInterrupt, "two")
    assert lines == [
        "", "(Ctrl-C again or Ctrl-D leaves)", "u:one", "", "(Ctrl-C again or Ctrl-D leaves)", "",
    ]  # fmt: skip


def test_two_models_answer_side_by_side_each_with_its_own_past() -> None:
    lines, session = talk("one", "two", voices=[Parrot("before"), Parrot("after")])
    assert lines == ["before: u:one", "after: u:one", "before: uau:two", "after: uau:two"]
    assert set(session.conversation.turns[0].answers) == {"before", "after"}


def test_scores_and_cut_answers_are_noted() -> None:
    lines, _ = talk(
        "/set max_tokens 3", "one", score=lambda messages, reply: 0.25, interactive=True
    )
    assert lines[-3:-1] == ["u:one", "(score +0.250, cut after 5 tokens, see /set)"]


def test_the_oldest_turns_go_when_the_model_has_no_room() -> None:
    voice = Parrot()
    voice.positions = 40  # half of them are kept for the answer
    lines, _ = talk("a" * 9, "b" * 9, voices=[voice], interactive=True)
    assert lines[1:] == [
        "u:" + "a" * 9,
        "(the model does not see the oldest 1 questions: too long)",
        "u:" + "b" * 9,
        "",
    ]


def test_an_error_of_one_question_does_not_end_the_chat() -> None:
    voice = Parrot()
    voice.fail = True
    lines, session = talk("one", "/show", voices=[voice])
    assert lines[0].startswith("error: m: the template refuses")
    assert session.conversation.turns == []


def test_a_line_that_ends_with_a_backslash_goes_on() -> None:
    assert talk("one\\", "two")[0] == ["u:one", "two"]
    assert talk("one\\")[0] == ["u:one"]


@pytest.mark.parametrize("evil", ["\x1b[2J", "\u202e"])
def test_an_answer_cannot_control_the_terminal(evil: str) -> None:
    assert evil not in "\n".join(talk(f"a{evil}b")[0])
