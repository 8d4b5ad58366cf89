"""From a file of completions to items in the order they are asked, with a real reward model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.assembly.choosing import chosen_items, rewards_of, write_items
from cluster.contracts.config.choice import ChoiceConfig
from cluster.contracts.config.offline import RewardModelConfig
from cluster.contracts.errors import UserError
from cluster.pages.labelling.items import read_groups, read_items
from learner.models.tiny import fresh_model, train_tokenizer
from learner.offline.reward import train_reward_model
from reward_service.preferences.choice import disagreement
from reward_service.preferences.store import PreferenceStore

WORDS = ("red", "green", "blue", "grey", "pink")


def rows(count: int = 6) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": f"which colour has thing {n}?"}],
            "completion": [{"role": "assistant", "content": f"{word} {'of course ' * n}"}],
            "metadata": {"topic": f"topic {n % 2}", "number": n},
        }
        for n in range(count)
        for word in WORDS
    ]


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("ensemble")
    tokenizer = train_tokenizer([" ".join(WORDS) * 3, "which colour has thing"], 300, folder / "t")
    policy = fresh_model(
        tokenizer, folder / "p", hidden=32, layers=2, heads=2, intermediate=48, seed=1
    )
    pairs = [{"prompt": f"q{n}", "chosen": "red", "rejected": "blue"} for n in range(8)]
    config = RewardModelConfig.model_validate(
        {
            "model": {"path": str(policy)},
            "data": {"path": written(folder / "pairs.jsonl", pairs)},
            "members": 3,
            "fit": {"max_steps": 1, "lr": 1e-3, "max_tokens": 64},
        }
    )
    return str(train_reward_model(config, folder / "run"))


def test_an_ensemble_chooses_what_its_members_see_most_differently(
    tmp_path: Path, ensemble: str
) -> None:
    path = written(tmp_path / "c.jsonl", rows())
    config = ChoiceConfig(strategy="disagreement", reward_model=ensemble, count=3)
    items = chosen_items(path, config, seed=0)
    groups = read_groups(path)
    scores = rewards_of(groups, ensemble)
    assert [one.shape for one in scores] == [(5, 3)] * 6
    best = max(disagreement(own[a] - own[b]) for own in scores for a in range(5) for b in range(a))
    values = [item.chosen_by.value for item in items if item.chosen_by and item.chosen_by.value]
    assert len(values) == 3
    assert values[0] == pytest.approx(best)
    assert np.all(np.diff(values) <= 0)


def test_the_order_and_the_reason_reach_the_store(tmp_path: Path) -> None:
    path = written(tmp_path / "c.jsonl", rows())
    config = ChoiceConfig(strategy="diversity", pairs_per_prompt=2, mismatched=0.5, overlap_share=1)
    items = chosen_items(path, config, seed=0)
    assert sorted({item.topic for item in items}) == ["topic 0", "topic 1"]
    write_items(items, tmp_path / "items.jsonl")
    read = read_items(
        str(tmp_path / "items.jsonl"), completions=2, license="unknown", created_at="2027-01-01"
    ).items
    assert [item.id for item in read] == [item.id for item in items], "in the order of the file"
    assert [item.chosen_by for item in read] == [item.chosen_by for item in items]
    store = PreferenceStore(tmp_path / "p.db")
    store.add_items(read)
    assert [item.chosen_by for item in store.items()] == [item.chosen_by for item in items]


def test_strategy_and_reward_model_go_together(tmp_path: Path) -> None:
    path = written(tmp_path / "c.jsonl", rows())
    with pytest.raises(UserError, match="none is named"):
        chosen_items(path, ChoiceConfig(strategy="uncertainty"), seed=0)
    with pytest.raises(UserError, match="asks no reward model"):
        chosen_items(path, ChoiceConfig(strategy="random", reward_model="x"), seed=0)
    with pytest.raises(UserError, match="no such reward-model directory"):
        chosen_items(path, ChoiceConfig(strategy="uncertainty", reward_model="x"), seed=0)
    alone = written(tmp_path / "one.jsonl", rows()[:1])
    with pytest.raises(UserError, match="no prompt with two different completions"):
        chosen_items(alone, ChoiceConfig(), seed=0)
