"""A reward from an AI judge: it rates each completion from 1 to 10 by a rubric."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from cluster.contracts.config.reward import JudgeSource
from cluster.contracts.errors import BadReward, UserError
from cluster.contracts.records import Prompt
from reward_service.access import source_access
from reward_service.judge.asker import EndpointAsker
from reward_service.judge.cache import ReplyCache
from reward_service.judge.questions import rate, words_hash
from reward_service.source import Part, ScoreItem, SourceContext


def make(source: JudgeSource, context: SourceContext) -> JudgeScorer:
    access = context.access or source_access(source)
    return JudgeScorer(source, access.token, context.deadline_s)


def check(source: JudgeSource, prompts: Sequence[Prompt]) -> None:
    """The judge is not asked: that may cost money."""
    source_access(source)
    if source.cache:
        ReplyCache(source.cache)


class JudgeScorer:
    """Asks about all completions of a batch side by side, and about equal ones once.

    Raises RewardFailure while the judge cannot be had, Unrated where its answers about a completion
    hold no rating, and BadReward for a budget that is spent. No completion gets a number that the
    judge did not say.
    """

    type = "judge"
    tokenizer = ""

    def __init__(self, source: JudgeSource, key: str | None, deadline_s: float) -> None:
        self.name = source.name
        # A margin, so that our own caller still hears why when the judge is slow.
        most_s = deadline_s * 0.9
        limits = {
            "deadline_s": min(source.deadline_s, most_s),
            "timeout_s": min(source.timeout_s, most_s),
        }
        self._rubric = source.rubric
        self._asker = EndpointAsker(source.model_copy(update=limits), key)
        decides = [source.base_url, source.model, source.temperature, source.max_tokens]
        words = words_hash(source.rubric, kind="rate")
        self.content = hashlib.sha256(json.dumps([*decides, words]).encode()).hexdigest()

    def score(self, items: Sequence[ScoreItem]) -> list[Part]:
        keys = [json.dumps([*map(dict, item.messages), item.response]) for item in items]
        first = dict(zip(reversed(keys), reversed(items), strict=True))
        questions = [
            rate(item.messages, item.response, self._rubric, label=item.label)
            for item in first.values()
        ]
        try:
            said = {place: answered.said for place, answered in self._asker.ask(questions)}
        except UserError as problem:  # a wrong key, an unknown model, a spent budget
            raise BadReward(f"reward source {self.name!r}: {problem}") from problem
        scores = {key: said[place] for place, key in enumerate(first)}
        return [Part(scores[key]) for key in keys]

    def close(self) -> None:
        self._asker.close()
