"""How several rewards become one score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from cluster.contracts.config.file import check_config
from cluster.contracts.config.reward import RewardConfig
from cluster.contracts.errors import BadReward, UserError
from reward_service.composition import Composition
from reward_service.source import Part, ScoreItem

ITEM = ScoreItem(id="i", messages=({"role": "user", "content": "q"},), response="a")


class Fixed:
    """A source that always gives the same part."""

    type, content, tokenizer = "fixed", "", ""

    def __init__(self, name: str, value: float, **detail: float) -> None:
        self.name, self.part = name, Part(value, detail=detail)

    def score(self, items: Sequence[ScoreItem]) -> list[Part]:
        return [self.part] * len(items)

    def close(self) -> None: ...


def value(helpful: float, safe: float, **how: Any) -> float:
    sources = [Fixed("helpful", helpful), Fixed("safe", safe)]
    return Composition(sources, [1.0, 2.0], **how).score([ITEM])[0].value


def test_sum_minimum_and_constraint_by_hand() -> None:
    assert value(3.0, 1.0) == 5.0
    assert value(3.0, 1.0, combine="minimum") == 2.0
    constraint = {"at_least": [None, 0.5]}
    assert value(3.0, 1.0, **constraint) == 3.0  # kept: it adds nothing
    assert value(3.0, -1.0, **constraint) == 3.0 - 2 * 1.5
    assert value(3.0, -1.0, combine="minimum", **constraint) == 0.0
    assert value(9.0, -9.0, clip=1.0, **constraint) == -1.0


def test_the_rule_is_part_of_the_version_and_details_are_kept() -> None:
    def version(**how: Any) -> str:
        return Composition([Fixed("a", 1.0), Fixed("b", 1.0)], [1.0, 1.0], **how).version

    rules: list[dict[str, Any]] = [{}, {"combine": "minimum"}, {"at_least": [None, 1.0]}]
    assert len({version(**rule) for rule in rules}) == 3
    scored = Composition([Fixed("a", 1.0, disagreement=0.25), Fixed("b", 2.0)], [1.0, 1.0])
    assert scored.score([ITEM])[0].parts == {"a": 1.0, "a/disagreement": 0.25, "b": 2.0}


def test_constraints_alone_are_refused() -> None:
    with pytest.raises(UserError, match="every source is a constraint"):
        check_config(RewardConfig, {"sources": [{"type": "rules", "at_least": 0}]}, where="t")


def test_a_source_of_some_policies_scores_their_completions_alone() -> None:
    asked: list[str] = []

    class Noted(Fixed):
        def score(self, items: Sequence[ScoreItem]) -> list[Part]:
            asked.extend(f"{self.name} {item.id}" for item in items)
            return super().score(items)

    items = [
        ScoreItem(id=name, messages=ITEM.messages, response="a", metadata={"policy": name})
        for name in ("brief", "wordy", "brief")
    ]
    sources = [Noted("short", 1.0), Noted("long", 2.0), Noted("safe", 4.0)]
    routed = Composition(sources, [1.0] * 3, policies=[("brief",), ("wordy",), ()])
    scores = routed.score(items)
    assert [score.value for score in scores] == [5.0, 6.0, 5.0]
    assert [set(score.parts) for score in scores] == [
        {"short", "safe"},
        {"long", "safe"},
        {"short", "safe"},
    ]
    assert asked == [
        *("short brief", "short brief"),
        "long wordy",
        *("safe brief", "safe wordy", "safe brief"),
    ]
    assert routed.version != Composition(sources, [1.0] * 3).version


def test_a_policy_that_no_source_scores_is_an_error_not_a_zero() -> None:
    routed = Composition([Fixed("short", 1.0)], [1.0], policies=[("brief",)])
    with pytest.raises(BadReward, match=r"no source scores .*'wordy'"):
        routed.score([ScoreItem(id="i", messages=(), response="a", metadata={"policy": "wordy"})])
