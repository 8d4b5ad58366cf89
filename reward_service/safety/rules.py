"""Rules on text: what they find, and the text that they leave. Pure but for word files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.contracts.config.safety import SafetyRule
from cluster.contracts.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """``count`` matches of a rule; of a classifier 1, with its ``probability``."""

    rule: str
    action: str
    penalty: float
    count: int = 1
    probability: float | None = None


class TextRules:
    """Raises UserError for a pattern that is none, and for a word file without words."""

    def __init__(self, rules: Sequence[SafetyRule]) -> None:
        self._rules = [(rule, _pattern(rule)) for rule in rules]

    def check(self, text: str) -> tuple[str, list[Hit]]:
        """The text with every match of a rewriting rule replaced, and the hits in the text as it
        was."""
        hits, left = [], text
        for rule, pattern in self._rules:
            count = sum(1 for _ in pattern.finditer(text))
            if not count:
                continue
            hits.append(Hit(rule=rule.name, action=rule.action, penalty=rule.penalty, count=count))
            if rule.action == "rewrite":
                left = pattern.sub(rule.replacement.replace("\\", r"\\"), left)
        return left, hits


def compiled(text: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as problem:
        raise UserError(
            f"{text!r} is not a regular expression: {problem}",
            where=where,
            fix="escape special characters with a backslash",
        ) from None


def _pattern(rule: SafetyRule) -> re.Pattern[str]:
    if rule.pattern is not None:
        return compiled(rule.pattern, f"safety rule {rule.name!r}")
    words = [*rule.words, *(_words_of(rule.words_file) if rule.words_file else [])]
    longest_first = sorted({word.strip() for word in words}, key=lambda word: (-len(word), word))
    phrases = "|".join(r"\s+".join(map(re.escape, word.split())) for word in longest_first)
    return re.compile(rf"(?<!\w)(?:{phrases})(?!\w)", re.IGNORECASE)


def _words_of(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(
            f"cannot be read: {problem}", where=path, fix="give a text file in UTF-8"
        ) from None
    words = [line.strip() for line in lines if line.strip()]
    if not words:
        raise UserError("holds no words", where=path, fix="write one word or phrase per line")
    return words
