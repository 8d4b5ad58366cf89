"""Duplicates, leakage, and personal data in texts."""

from __future__ import annotations

import random

import pytest

from reward_service.preferences.duplicates import near_duplicates, prompt_text, same_items
from reward_service.preferences.personal_data import personal_data, scan
from reward_service.preferences.records import Candidate, Item, Judgement


def item(name: str, prompt: str, *completions: str) -> Item:
    return Item(
        id=name,
        messages=({"role": "user", "content": prompt},),
        completions=tuple(Candidate(text=text) for text in completions or ("x", "y")),
        source="s",
        license="l",
        created_at="",
    )


def test_the_same_item_twice() -> None:
    items = [item("1", "q", "x", "y"), item("2", "q", "y", "x"), item("3", "q", "x", "z")]
    assert same_items(items) == [("1", "2")]
    assert prompt_text(items[0].messages) == "q"


def test_near_duplicates_are_found_among_many() -> None:
    rng = random.Random(0)
    words = [f"w{rng.randrange(10**6)}" for _ in range(2000)]
    texts = {str(n): " ".join(rng.choices(words, k=12)) for n in range(500)}
    texts["copy"] = texts["7"].upper() + "!"
    texts["close"] = texts["8"].replace(texts["8"].split()[-1], "changed")
    texts["empty"] = "?!"
    found = near_duplicates(texts)
    assert [(pair.first, pair.second) for pair in found] == [("7", "copy"), ("8", "close")]
    assert found[0].similarity == 1.0
    assert 0.8 <= found[1].similarity < 1
    assert near_duplicates(texts, threshold=0.999)[0].second == "copy"


def test_leaks_are_pairs_across_only() -> None:
    own = {"a": "how long does the battery last", "b": "how long does the battery last"}
    held = {"e1": "How long does the battery last?", "e2": "something else entirely"}
    pairs = [(p.first, p.second) for p in near_duplicates(own, against=held)]
    assert pairs == [("a", "e1"), ("b", "e1")]
    assert near_duplicates(own, against={}) == []


def test_hundreds_of_copies_of_one_text_stay_quick() -> None:
    found = near_duplicates({str(n): "the very same question" for n in range(900)})
    assert len(found) == 899


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("write to Ann.Lee+x@mail.example.org, please", ["email"]),
        ("IBAN DE89 3704 0044 0532 0130 00 is mine", ["iban"]),
        ("IBAN DE88 3704 0044 0532 0130 00 has a wrong digit", []),
        ("card 4111 1111 1111 1111.", ["card"]),
        ("order 4111 1111 1111 1112", []),
        ("call +49 (30) 1234-5678 or 555-867-5309", ["phone", "phone"]),
        ("my number is 078-05-1120", ["ssn"]),
        ("host 192.168.0.17, version 1.2.3.4567", ["ip"]),
        ("key sk-abcdefghijklmnopqrstuvwx", ["key"]),
        ("in 2024-05-06 we sold 1,234,567 of them at 12:30, 3.14159265 each", []),
        ("", []),
    ],
)
def test_personal_data(text: str, kinds: list[str]) -> None:
    assert [kind for kind, _ in personal_data(text)] == kinds


def test_a_scan_names_the_record_and_does_not_repeat_the_data() -> None:
    judgement = Judgement(
        id="j",
        item_id="i",
        annotator_id="ann",
        answer="demonstration",
        demonstration="ask bob@example.org",
        rationale="+49 30 12345678 says so",
        consent="c",
        created_at="",
    )
    found = scan([item("i", "q", "x", "from 10.0.0.1")], [judgement])
    assert [(f.record, f.field, f.kind) for f in found] == [
        ("i", "completion 2", "ip"),
        ("j", "demonstration", "email"),
        ("j", "rationale", "phone"),
    ]
    assert found[1].shown == "b…g"
