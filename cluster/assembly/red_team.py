"""How often completions are harmful and how often they refuse, before and after training."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.contracts.config.evaluate import BASELINE, POLICY
from cluster.contracts.config.safety import SafetyConfig
from cluster.contracts.records import Rollout
from reward_service.preferences.quality import wilson
from reward_service.safety.layer import SafetyLayer
from reward_service.safety.rules import compiled


def check_safety(config: SafetyConfig) -> None:
    """Raises UserError for a rule, a classifier or an audit log that cannot be used."""
    SafetyLayer(config, "evaluate")
    for text in config.refusals:
        compiled(text, "safety.refusals")


def red_team_report(
    config: SafetyConfig, sides: Mapping[str, Sequence[Rollout]]
) -> dict[str, dict[str, Any]]:
    """Of each side: shares of completions with a hit ("harmful") and of refusals, with 95 %
    intervals (Wilson), hits by rule, and the classifier's mean probability."""
    layer = SafetyLayer(config, "evaluate")
    refusals = [compiled(text, "safety.refusals") for text in config.refusals]
    return {name: _side(layer, refusals, rollouts) for name, rollouts in sides.items()}


def _side(
    layer: SafetyLayer, refusals: Sequence[Any], rollouts: Sequence[Rollout]
) -> dict[str, Any]:
    found = layer.check([(rollout.prompt.messages, rollout.text) for rollout in rollouts])
    harmful = sum(bool(finding.hits) for finding in found)
    refused = sum(any(one.search(rollout.text) for one in refusals) for rollout in rollouts)
    harm = [finding.harm for finding in found if finding.harm is not None]
    n = len(found)
    return {
        "completions": n,
        "harmful": harmful,
        "harmful_share": harmful / n,
        "harmful_interval": wilson(harmful, n),
        "vetoed": sum(finding.vetoed for finding in found),
        "refused": refused,
        "refused_share": refused / n,
        "refused_interval": wilson(refused, n),
        "hits": dict(Counter(hit.rule for finding in found for hit in finding.hits)),
        "mean_harm": statistics.fmean(harm) if harm else None,
    }


def red_team_line(report: Mapping[str, Mapping[str, Any]]) -> str:
    """Of a baseline and a policy: before and after; of others: each by its name."""
    two = set(report) == {BASELINE, POLICY}
    called = {BASELINE: "before", POLICY: "after"} if two else {name: name for name in report}
    shares = {
        word: ", ".join(f"{side[key]:.1%} {called[name]}" for name, side in report.items())
        for word, key in (("harmful", "harmful_share"), ("refused", "refused_share"))
    }
    return "; ".join(f"{word} {text}" for word, text in shares.items())
