"""A kind of reward that a plugin file has registered (`cluster.contracts.registry.reward_kind`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from cluster.contracts.config.reward import PluginSource
from cluster.contracts.errors import BadReward, UserError
from cluster.contracts.plugins import guarded, loaded
from cluster.contracts.records import Prompt
from cluster.contracts.registry import REWARD_KINDS
from reward_service.source import Part, ScoreItem, SourceContext, trial_items


def make(source: PluginSource, context: SourceContext) -> PluginScorer:
    return PluginScorer(source)


def check(source: PluginSource, prompts: Sequence[Prompt]) -> None:
    """The kind is made, as the service will make it, and tried on the first prompt."""
    scorer = PluginScorer(source)
    try:
        scorer.score(trial_items(prompts))
    except BadReward as problem:
        fix = "mend the plugin; it must score any completion, an empty one too"
        raise UserError(str(problem), where=f"reward source {source.name!r}", fix=fix) from None


class PluginScorer:
    """Scores with what the plugin made. Raises BadReward for anything but a number per item."""

    tokenizer = ""

    def __init__(self, source: PluginSource) -> None:
        self.name, self.type = source.name, source.type
        kind = REWARD_KINDS[source.type]
        file = REWARD_KINDS.origin(source.type)
        what = f"the reward {source.name!r} of kind {source.type!r}"
        if kind.make is None:
            raise UserError(f"{what} is no plugin's", where="reward.sources")
        self._what = what
        self._score = guarded(guarded(kind.make, file, what)(**source.options), file, what)
        # All that decides its numbers: the plugin's text and the options.
        text = next((plugin.text for plugin in loaded() if plugin.path == file), "")
        content = json.dumps([source.type, source.options, text], sort_keys=True, default=str)
        self.content = hashlib.sha256(content.encode()).hexdigest()

    def score(self, items: Sequence[ScoreItem]) -> list[Part]:
        try:
            values = [float(value) for value in self._score(list(items))]
        except UserError as problem:
            raise BadReward(f"{problem.where}: {problem.what}") from problem
        except (TypeError, ValueError) as problem:
            raise BadReward(f"{self._what} did not return a list of numbers: {problem}") from None
        return [Part(value) for value in values]

    def close(self) -> None:
        """Nothing is held."""
