"""Personal data in texts, by patterns. Pure.

Found: e-mail addresses, phone numbers written with a country code or in the North American form,
IBANs and card numbers (with their check digits), IP addresses, US social security numbers, and keys
of known services. Names and postal addresses are not found: patterns cannot tell them from other
words. A scan that finds nothing does not show that there is nothing.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from reward_service.preferences.records import Item, Judgement


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """``record``: id of the item or judgement. ``field``: where in it. ``shown``: the first
    and the last character only."""

    record: str
    field: str
    kind: str
    shown: str


def _iban(text: str) -> bool:
    plain = text.replace(" ", "").upper()
    digits = "".join(str(int(c, 36)) for c in plain[4:] + plain[:4])
    return int(digits) % 97 == 1


def _card(text: str) -> bool:
    """Luhn's check digit."""
    digits = [int(c) for c in text if c.isdigit()]
    doubled = [d * 2 - 9 * (d > 4) for d in digits[-2::-2]]
    return 13 <= len(digits) <= 19 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _ip(text: str) -> bool:
    try:
        return not ipaddress.ip_address(text).is_unspecified
    except ValueError:
        return False


def _phone(text: str) -> bool:
    return 8 <= sum(c.isdigit() for c in text) <= 15


def _any(text: str) -> bool:
    return bool(text)


_PATTERNS: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    ("email", re.compile(r"\b[\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)+\b"), _any),
    ("iban", re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{2,4}){3,8}\b"), _iban),
    ("card", re.compile(r"(?<![\d-])\d(?:[ -]?\d){12,18}(?![\d-])"), _card),
    (
        "ssn",
        re.compile(r"(?<![\d-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])"),
        _any,
    ),
    ("phone", re.compile(r"(?<![\w+])\+\d{1,3}(?:[ ().-]{0,2}\d){6,13}(?!\d)"), _phone),
    ("phone", re.compile(r"(?<!\d)(?:\(\d{3}\) ?|\d{3}[-.])\d{3}[-.]\d{4}(?!\d)"), _phone),
    ("ip", re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.])"), _ip),
    ("key", re.compile(r"\b(?:sk-[\w-]{20,}|gh[pousr]_\w{30,}|AKIA[0-9A-Z]{16})"), _any),
)


def personal_data(text: str) -> list[tuple[str, str]]:
    """(kind, text) of each finding; none lies within another's text."""
    found: list[tuple[int, int, str]] = []
    for kind, pattern, is_one in _PATTERNS:
        for match in pattern.finditer(text):
            start, end = match.span()
            if is_one(match[0]) and all(end <= a or b <= start for a, b, _ in found):
                found.append((start, end, kind))
    return [(kind, text[start:end]) for start, end, kind in sorted(found)]


def scan(items: Iterable[Item], judgements: Iterable[Judgement]) -> list[Finding]:
    """Prompts and completions of items; demonstrations and rationales of judgements."""
    texts = [
        (item.id, field, text)
        for item in items
        for field, text in [
            *((f"prompt, message {n}", m["content"]) for n, m in enumerate(item.messages, start=1)),
            *((f"completion {n}", c.text) for n, c in enumerate(item.completions, start=1)),
        ]
    ]
    for entry in judgements:
        texts.append((entry.id, "demonstration", entry.demonstration or ""))
        texts.append((entry.id, "rationale", entry.rationale))
    return [
        Finding(record=record, field=field, kind=kind, shown=f"{what[0]}…{what[-1]}")
        for record, field, text in texts
        for kind, what in personal_data(text)
    ]
