"""What a person at `accord chat --safety` may read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from cluster.chat.safe_voice import SafeVoice, load_safety
from cluster.chat.voice import ChatSettings, Reply, Show
from cluster.contracts.errors import UserError

RULES = """
refusal = "No."
[[rules]]
name = "weapons"
pattern = "bomb"
[[rules]]
name = "phone"
pattern = '\\d{3}-\\d{4}'
action = "rewrite"
"""


class Says:
    """Shows its answer letter by letter."""

    name, plain, positions = "after", False, None

    def __init__(self, text: str) -> None:
        self.text = text

    def tokens(self, messages: Sequence[Mapping[str, str]]) -> int:
        return 7

    def reply(
        self, messages: Sequence[Mapping[str, str]], settings: ChatSettings, show: Show
    ) -> Reply:
        for letter in self.text:
            show(letter)
        return Reply(self.text, "stop", len(self.text))


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("take a bomb", "No."),
        ("call 555-1234.", "call [removed]."),
        ("hello", "hello"),
        ("", ""),
    ],
)
def test_nothing_is_shown_before_it_is_checked(tmp_path: Path, said: str, read: str) -> None:
    rules = tmp_path / "safety.toml"
    rules.write_text(f'audit = "{tmp_path / "audit.jsonl"}"\n{RULES}', encoding="utf-8")
    voice = SafeVoice(Says(said), load_safety(str(rules)))
    shown: list[str] = []
    prompt = [{"role": "user", "content": "q"}]
    reply = voice.reply(prompt, ChatSettings(), shown.append)
    assert shown == [read]
    assert (reply.text, reply.ended) == (read, "stop")
    assert (voice.name, voice.tokens(prompt)) == ("after", 7)
    hits = (tmp_path / "audit.jsonl").read_text().splitlines()
    assert len(hits) == (said != read)


def test_a_file_with_a_mistake_is_refused(tmp_path: Path) -> None:
    rules = tmp_path / "safety.toml"
    rules.write_text('rules = [{ name = "r", patern = "x" }]', encoding="utf-8")
    with pytest.raises(UserError, match="pattern"):
        load_safety(str(rules))
