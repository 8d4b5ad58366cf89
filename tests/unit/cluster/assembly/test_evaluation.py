"""A judge that the policy was trained on is recognised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.assembly.evaluation import judges_trained_with
from cluster.contracts.config.evaluate import EvaluateConfig
from cluster.contracts.config.file import dump_toml
from cluster.contracts.config.train import TrainConfig


def evaluation(policy: Path, *judges: dict[str, Any]) -> EvaluateConfig:
    return EvaluateConfig.model_validate(
        {
            "policy": {"path": str(policy)},
            "baseline": {"path": "base"},
            "data": {"prompts": "p"},
            "judge": {"sources": list(judges)},
        }
    )


def trained(run: Path, *rewards: dict[str, Any]) -> Path:
    config = TrainConfig.model_validate(
        {"model": {"path": "m"}, "data": {"prompts": "p"}, "reward": {"sources": list(rewards)}}
    )
    run.mkdir(parents=True)
    (run / "config.toml").write_text(dump_toml(config))
    (run / "manifest.json").write_text("{}")
    return run / "policy"


MODEL = {"type": "model", "path": "rm/reward_model", "name": "rm"}
RULES = {"type": "rules", "max_words": 5, "name": "rules"}


@pytest.mark.parametrize(
    ("reward", "judge", "same"),
    [
        (MODEL, MODEL, True),
        (MODEL, {**MODEL, "name": "other", "weight": 2.0}, True),
        (MODEL, {**MODEL, "path": "./rm/../rm/reward_model"}, False),  # not resolved, not claimed
        (MODEL, {**MODEL, "path": "rm2/reward_model"}, False),
        (RULES, RULES, True),
        (RULES, {**RULES, "max_words": 6}, False),
        ({"type": "function", "path": "r.py:f"}, {"type": "function", "path": "r.py:f"}, True),
        ({"type": "function", "path": "r.py:f"}, {"type": "function", "path": "r.py:g"}, False),
        (MODEL, RULES, False),
    ],
)
def test_the_same_source_by_any_name(
    tmp_path: Path, reward: dict[str, Any], judge: dict[str, Any], same: bool
) -> None:
    policy = trained(tmp_path / "run", reward)
    found = judges_trained_with(evaluation(policy, judge))
    assert bool(found) is same
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000010" / "policy"
    assert bool(judges_trained_with(evaluation(checkpoint, judge))) is same


def test_a_policy_that_no_run_made_and_one_of_the_quickstart(tmp_path: Path) -> None:
    assert judges_trained_with(evaluation(tmp_path / "policy", MODEL)) == []
    trained(tmp_path / "quickstart" / "ppo", MODEL)
    (tmp_path / "quickstart" / "manifest.json").write_text("{}")
    policy = tmp_path / "quickstart" / "policy"
    assert judges_trained_with(evaluation(policy, RULES, MODEL)) == ["rm"]
