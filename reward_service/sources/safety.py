"""The safety layer as a reward: 0, less the penalties; a veto gets a score of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from cluster.contracts.config.reward import SafetySource
from cluster.contracts.errors import BadReward, UserError
from cluster.contracts.records import Prompt
from reward_service.safety.layer import Finding, SafetyLayer
from reward_service.source import Part, ScoreItem, SourceContext
from reward_service.source_paths import with_paths


def make(source: SafetySource, context: SourceContext) -> SafetyScorer:
    return SafetyScorer(source, context.threads)


def check(source: SafetySource, prompts: Sequence[Prompt]) -> None:
    SafetyLayer(source, "train")


class SafetyScorer:
    """Rewriting rules count as penalties: a policy is trained on what it sampled, and nothing
    else. Every hit is also named in the vetoes."""

    type = "safety"
    tokenizer = ""

    def __init__(self, source: SafetySource, threads: int = 1) -> None:
        self.name = source.name
        self._source = source
        self._layer = SafetyLayer(source, "train", threads)
        keys = {"weight", "name", "audit", "audit_text", "refusal", "refusals", "at_least"}
        decides = with_paths(source, _content).model_dump(exclude=keys)
        self.content = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def score(self, items: Sequence[ScoreItem]) -> list[Part]:
        try:
            found = self._layer.check([(item.messages, item.response) for item in items])
        except UserError as problem:  # the audit log is full: no hit goes unnoticed
            raise BadReward(str(problem)) from problem
        return [self._part(finding) for finding in found]

    def _part(self, finding: Finding) -> Part:
        value = self._source.veto_score if finding.vetoed else -finding.penalty
        return Part(value, tuple(f"{self.name}: {hit.rule}" for hit in finding.hits))

    def close(self) -> None:
        """Nothing is held."""


def _content(path: str) -> str:
    """A hash of a word list, or of a classifier's weights, wherever they lie; the id of one of the
    hub stays."""
    place = Path(path)
    if not place.is_dir():
        return _digest(place) if place.is_file() else path
    return " ".join(_digest(file) for file in sorted(place.glob("*.safetensors")))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
