"""Rewards by fixed rules, in plain Python."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence

from cluster.contracts.config.reward import RulesSource
from cluster.contracts.errors import UserError
from cluster.contracts.records import Prompt
from reward_service.source import Part, ScoreItem, SourceContext


def make(source: RulesSource, context: SourceContext) -> RulesScorer:
    return RulesScorer(source)


def check(source: RulesSource, prompts: Sequence[Prompt]) -> None:
    RulesScorer(source)


class RulesScorer:
    """0 for an answer that keeps every rule, minus 1 for each broken one and the repetition share.

    Words are what white space separates. A broken rule is also named in the vetoes. Patterns are
    searched (``re.search``) in the answer's text.
    """

    type = "rules"
    tokenizer = ""

    def __init__(self, source: RulesSource) -> None:
        self.name = source.name
        self._source = source
        self._required = [_compiled(source.name, "required", text) for text in source.required]
        self._forbidden = [_compiled(source.name, "forbidden", text) for text in source.forbidden]
        rules = source.model_dump(exclude={"weight", "name"})
        self.content = hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()

    def score(self, items: Sequence[ScoreItem]) -> list[Part]:
        return [self._one(item.response) for item in items]

    def _one(self, text: str) -> Part:
        broken = []
        count = len(text.split())
        if self._source.min_words is not None and count < self._source.min_words:
            broken.append("min_words")
        if self._source.max_words is not None and count > self._source.max_words:
            broken.append("max_words")
        broken += [f"required {p.pattern!r}" for p in self._required if not p.search(text)]
        broken += [f"forbidden {p.pattern!r}" for p in self._forbidden if p.search(text)]
        value = -float(len(broken))
        if self._source.repetition:
            value -= repeated_share(text)
        return Part(value, tuple(f"{self.name}: {rule}" for rule in broken))

    def close(self) -> None:
        """Nothing is held."""


def repeated_share(text: str, n: int = 3) -> float:
    """Share, in [0, 1), of the text's word n-grams (case ignored) that occurred before in it."""
    words = text.lower().split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def _compiled(name: str, key: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(
            f"{text!r} is not a regular expression: {error}",
            where=f"reward source {name!r}, key {key!r}",
            fix="escape special characters with a backslash",
        ) from error
