"""The safety layer: rules and classifier on completions, each hit in an audit log."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.contracts.config.safety import SafetyConfig
from cluster.contracts.errors import UserError
from cluster.contracts.records import Message
from reward_service.preferences.records import prompt_hash, text_hash, utc_now
from reward_service.safety.classifier import HarmClassifier
from reward_service.safety.rules import Hit, TextRules

Said = tuple[Sequence[Message], str]
"""A prompt and its completion."""
CLASSIFIER = "classifier"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """``text``: the completion after rewriting. ``harm``: the classifier's probability."""

    text: str
    hits: tuple[Hit, ...] = ()
    harm: float | None = None

    @property
    def vetoed(self) -> bool:
        return any(hit.action == "veto" for hit in self.hits)

    @property
    def penalty(self) -> float:
        """Of all hits, each match counted."""
        return sum(hit.penalty * hit.count for hit in self.hits)


class SafetyLayer:
    """``place``: what asks ("train", "chat", ...), for the audit log."""

    def __init__(self, config: SafetyConfig, place: str, threads: int = 1) -> None:
        self.config = config
        self._place = place
        self._rules = TextRules(config.rules)
        rule = config.classifier
        self._classifier = HarmClassifier(rule, threads) if rule is not None else None
        if config.audit:
            _append(Path(config.audit), [])  # a file that cannot be written is found out now

    def check(self, said: Sequence[Said]) -> list[Finding]:
        """One finding per completion, in order."""
        harm = self._harm(said)
        found = [self._finding(text, harm[n]) for n, (_, text) in enumerate(said)]
        if self.config.audit:
            lines = [
                self._line(messages, text, hit)
                for (messages, text), finding in zip(said, found, strict=True)
                for hit in finding.hits
            ]
            _append(Path(self.config.audit), lines)
        return found

    def _harm(self, said: Sequence[Said]) -> list[float] | list[None]:
        rule = self.config.classifier
        if self._classifier is None or rule is None:
            return [None] * len(said)
        texts = [
            "\n".join([*(m["content"] for m in messages), text]) if rule.sees_prompt else text
            for messages, text in said
        ]
        return self._classifier.probabilities(texts)

    def _finding(self, text: str, harm: float | None) -> Finding:
        left, hits = self._rules.check(text)
        rule = self.config.classifier
        if rule is not None and harm is not None and harm >= rule.threshold:
            hits.append(
                Hit(rule=CLASSIFIER, action=rule.action, penalty=rule.penalty, probability=harm)
            )
        return Finding(text=left, hits=tuple(hits), harm=harm)

    def _line(self, messages: Sequence[Message], text: str, hit: Hit) -> str:
        entry = {
            "time": utc_now(),
            "place": self._place,
            "rule": hit.rule,
            "action": hit.action,
            "count": hit.count,
            "probability": hit.probability,
            "prompt_sha256": prompt_hash(messages),
            "completion_sha256": text_hash(text),
        }
        if self.config.audit_text:
            entry["completion"] = text
        return json.dumps(entry) + "\n"


def _append(path: Path, lines: Sequence[str]) -> None:
    """In one write, so that lines of several processes do not mix."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            if lines:
                os.write(descriptor, "".join(lines).encode())
        finally:
            os.close(descriptor)
    except OSError as problem:
        raise UserError(
            f"cannot be written: {problem.strerror}",
            where=f"audit log {path}",
            fix="name another file in safety.audit, or free some space",
        ) from None
