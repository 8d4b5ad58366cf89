"""Which pairs are asked, in which order, and what the store keeps of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cluster.contracts.config.choice import ChoiceConfig
from cluster.contracts.errors import UserError
from reward_service.preferences.choice import (
    ChosenPair,
    CompletionGroup,
    choose_pairs,
    disagreement,
    item_id,
    item_of,
    uncertainty,
)
from reward_service.preferences.records import Candidate, ChosenBy
from reward_service.preferences.spread import text_features
from reward_service.preferences.store import PreferenceStore

NAMES = ("lamp", "kettle", "fan", "chair", "desk", "clock", "radio", "stove")


def groups_of(
    count: int = 8, completions: int = 6, version: str | None = None
) -> list[CompletionGroup]:
    return [
        CompletionGroup(
            messages=({"role": "user", "content": f"how much is the {NAMES[n % 8]} of sort {n}?"},),
            completions=tuple(
                Candidate(text=f"{NAMES[n % 8]} {n} costs {100 * n + k}", policy_version=version)
                for k in range(completions)
            ),
            alike=("topic/price" if n % 2 else "topic/size",),
        )
        for n in range(count)
    ]


def of_own(pairs: list[ChosenPair]) -> list[ChosenPair]:
    return [pair for pair in pairs if not pair.mismatched]


def test_the_measures() -> None:
    assert uncertainty(np.array([0.0])) == 1.0
    assert uncertainty(np.array([np.log(3)])) == pytest.approx(0.8113, abs=1e-4)
    assert uncertainty(np.array([1000.0])) == 0.0
    assert uncertainty(np.array([30.0, -30.0])) == pytest.approx(1.0), "of the mean, not the mean"
    assert disagreement(np.array([1.0, 3.0])) == 1.0


@pytest.mark.parametrize("strategy", ["random", "newest", "diversity"])
def test_pairs_of_a_prompt_share_no_completion_and_the_seed_decides(strategy: str) -> None:
    groups = groups_of()
    config = ChoiceConfig.model_validate({"strategy": strategy, "pairs_per_prompt": 3})
    pairs = choose_pairs(groups, config, seed=1)
    assert pairs == choose_pairs(groups, config, seed=1) != choose_pairs(groups, config, seed=2)
    assert len(pairs) == 24
    assert {pair.strategy for pair in pairs} == {strategy}
    used = Counter(place for pair in pairs for place in (pair.first, pair.second))
    assert set(used.values()) == {1}, "six completions make three pairs"
    fewer = choose_pairs(groups, config.model_copy(update={"pairs_per_prompt": 5}), seed=1)
    assert len(set(fewer)) == len(fewer) == 40, "then completions come again, pairs do not"


def test_at_random_every_prompt_comes_before_any_comes_twice() -> None:
    config = ChoiceConfig(pairs_per_prompt=3, count=8)
    pairs = choose_pairs(groups_of(), config, seed=0)
    assert sorted(pair.first[0] for pair in pairs) == list(range(8))
    assert {pair.value for pair in pairs} == {None}


def rewards(groups: list[CompletionGroup], members: int) -> list[NDArray[np.float64]]:
    """Far apart within all prompts but the fourth, where the members differ, too."""
    return [
        np.array([[100.0 * c] * members for c in range(len(group.completions))])
        if n != 3
        else np.array([[0.1 * c * m for m in range(members)] for c in range(6)])
        for n, group in enumerate(groups)
    ]


def test_the_reward_model_is_asked_about_what_it_knows_least() -> None:
    groups = groups_of()
    config = ChoiceConfig(strategy="disagreement", pairs_per_prompt=2, count=3)
    first, second, _ = choose_pairs(groups, config, 0, rewards(groups, 3))
    assert (first.first, first.second) == ((3, 0), (3, 5)), "the pair the members differ most about"
    assert first.value == pytest.approx(np.std([0, 0.5, 1.0]))
    assert second.first[0] == 3
    assert second.value is not None
    config = ChoiceConfig(strategy="uncertainty", pairs_per_prompt=2, count=1)
    (only,) = choose_pairs(groups, config, 0, rewards(groups, 1))
    assert (only.first[0], only.value) == (3, 1.0), "that one has no opinion at all"


def test_scores_must_be_there() -> None:
    groups = groups_of()
    config = ChoiceConfig(strategy="disagreement")
    with pytest.raises(UserError, match="no rewards"):
        choose_pairs(groups, config, 0)
    with pytest.raises(UserError, match="cannot disagree with itself"):
        choose_pairs(groups, config, 0, rewards(groups, 1))


def test_the_newest_policy_comes_first() -> None:
    groups = [
        *groups_of(2, version="round 1 step 40"),
        *groups_of(2, version="round 2 step 5"),
        *groups_of(2, version="round 2 final"),
        *groups_of(2, version=None),
    ]
    config = ChoiceConfig(strategy="newest", count=6)
    pairs = choose_pairs(groups, config, 0)
    assert [pair.first[0] // 2 for pair in pairs] == [2, 2, 1, 1, 0, 0]
    assert [pair.value for pair in pairs] == [3, 3, 2, 2, 1, 1]


def test_a_batch_does_not_ask_the_same_twice() -> None:
    groups = [*groups_of(4), *groups_of(4)]  # every prompt and completion is there twice
    config = ChoiceConfig(strategy="disagreement", count=4)
    scores = [np.array([[0.0, 0.1 * n * c] for c in range(6)]) for n in [1, 2, 3, 4] * 2]
    pairs = choose_pairs(groups, config, 0, scores)
    assert sorted(pair.first[0] % 4 for pair in pairs) == [0, 1, 2, 3]
    more = choose_pairs(groups, config.model_copy(update={"count": 8}), 0, scores)
    assert len(more) == 8
    assert more[:4] == pairs, "what is almost the same comes after the others"


def test_diversity_asks_about_the_odd_prompts() -> None:
    usual = [
        CompletionGroup(
            messages=({"role": "user", "content": f"how much is the lamp, please, number {n}?"},),
            completions=(Candidate(text="it costs ten"), Candidate(text="it costs nine")),
        )
        for n in range(10)
    ]
    odd = CompletionGroup(
        messages=({"role": "user", "content": "whales sing under ice"},),
        completions=(Candidate(text="deep blue songs"), Candidate(text="arctic winter nights")),
    )
    pairs = choose_pairs([*usual, odd], ChoiceConfig(strategy="diversity", count=2), seed=0)
    assert 10 in {pair.first[0] for pair in pairs}
    assert pairs[0].value is None
    assert 0.5 < (pairs[1].value or 0) <= 1.0
    same, again, other = text_features(["a lamp of ten", "a lamp of ten", "two whales"])
    assert same @ again == pytest.approx(1.0)
    assert same @ other < 0.2


def test_mismatched_pairs_are_a_share_of_all() -> None:
    groups = groups_of()
    config = ChoiceConfig(pairs_per_prompt=4, mismatched=0.5)
    pairs = choose_pairs(groups, config, seed=3)
    wrong = [pair for pair in pairs if pair.mismatched]
    assert len(pairs) == 32
    assert len(wrong) == 16
    assert Counter(pair.first[0] for pair in wrong) == dict.fromkeys(range(8), 2)
    assert {pair.strategy for pair in wrong} == {"mismatched"}
    used = Counter(p for pair in of_own(pairs) for p in (pair.first, pair.second))
    used.update(pair.first for pair in wrong)
    assert set(used.values()) == {1}, "the second completions alone are used again"
    alike = [groups[p.first[0]].alike == groups[p.second[0]].alike for p in wrong]
    assert sum(alike) >= 8, "every second one is of a prompt with something in common"
    alone = choose_pairs(groups[:1], config, seed=3)
    assert len(alone) == 2
    assert not any(pair.mismatched for pair in alone)


def test_equal_texts_are_never_compared() -> None:
    twins = CompletionGroup(
        messages=({"role": "user", "content": "hi"},),
        completions=tuple(Candidate(text=text) for text in ("yes", "yes", "no")),
    )
    pairs = choose_pairs([twins, twins], ChoiceConfig(pairs_per_prompt=3, mismatched=0.5), seed=0)
    assert pairs
    for pair in pairs:
        assert (pair.first[1] == 2) != (pair.second[1] == 2), "of 'yes' and 'no'"


def test_a_share_is_judged_twice() -> None:
    pairs = choose_pairs(groups_of(), ChoiceConfig(pairs_per_prompt=3, overlap_share=0.25), seed=0)
    twice = [number for number, pair in enumerate(pairs) if pair.judgements == 2]
    assert twice == [3, 7, 11, 15, 19, 23]


def test_the_store_keeps_why_an_item_is_asked(tmp_path: Path) -> None:
    groups = groups_of()
    config = ChoiceConfig(strategy="uncertainty", count=4, mismatched=0.5, overlap_share=1)
    pairs = choose_pairs(groups, config, 0, rewards(groups, 2))
    items = [
        item_of(groups, pair, source="a run", license="MIT", created_at="2026-01-01T00:00:00+00:00")
        for pair in pairs
    ]
    store = PreferenceStore(tmp_path / "p.db")
    assert store.add_items(items) == 4
    assert store.items() == items
    found = Counter(item.chosen_by.strategy for item in store.items() if item.chosen_by)
    assert found == {"uncertainty": 2, "mismatched": 2}
    assert {item.chosen_by.judgements for item in store.items() if item.chosen_by} == {2}
    with pytest.raises(ValueError, match="needs a strategy"):
        ChosenBy(strategy="", value=1.0)


@pytest.mark.parametrize("strategy", ["random", "diversity"])
def test_nothing_is_asked_twice(strategy: str) -> None:
    groups = groups_of(completions=4)
    config = ChoiceConfig.model_validate({"strategy": strategy, "count": 12, "pairs_per_prompt": 6})
    asked: set[str] = set()
    for seed in range(4):
        asked |= {item_id(groups, pair) for pair in choose_pairs(groups, config, seed, asked=asked)}
    assert len(asked) == 48, "six pairs of each prompt"
    assert choose_pairs(groups, config, 5, asked=asked) == []


def test_no_item_is_there_twice_in_a_batch() -> None:
    """All prompts have the same completions, so most mismatched pairs are pairs of own ones."""
    texts = (Candidate(text="yes"), Candidate(text="no"), Candidate(text="maybe"))
    groups = [
        CompletionGroup(messages=({"role": "user", "content": str(n)},), completions=texts)
        for n in range(6)
    ]
    pairs = choose_pairs(groups, ChoiceConfig(pairs_per_prompt=4, mismatched=0.5), seed=0)
    names = [item_id(groups, pair) for pair in pairs]
    assert len(set(names)) == len(names)
    assert {pair.mismatched for pair in pairs} == {True, False}
