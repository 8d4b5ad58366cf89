"""A reward served elsewhere: any program that speaks ``accord.reward.v1``."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.contracts.config.reward import GrpcSource
from cluster.contracts.records import Prompt
from reward_service.access import Access, source_access
from reward_service.client import RewardClient
from reward_service.source import Part, ScoreItem, SourceContext

CONNECT_S = 3.0


def make(source: GrpcSource, context: SourceContext) -> GrpcScorer:
    access = context.access or source_access(source)
    return GrpcScorer(source, deadline_s=context.deadline_s, access=access)


def check(source: GrpcSource, prompts: Sequence[Prompt]) -> None:
    with RewardClient([source.address], access=source_access(source)) as client:
        client.connect(CONNECT_S)


class GrpcScorer:
    """Asks the other service; its version is pinned when this source is loaded."""

    type = "grpc"

    def __init__(self, source: GrpcSource, *, deadline_s: float, access: Access) -> None:
        self.name = source.name
        # A margin, so that our own caller still hears why when the other service is slow.
        self._client = RewardClient([source.address], deadline_s=deadline_s * 0.9, access=access)
        try:
            info = self._client.connect()
        except BaseException:
            self._client.close()
            raise
        self.content = info.scorer_version
        self.tokenizer = info.tokenizer

    def score(self, items: Sequence[ScoreItem]) -> list[Part]:
        return [Part(score.value, score.vetoes) for score in self._client.score_items(items)]

    def close(self) -> None:
        self._client.close()
