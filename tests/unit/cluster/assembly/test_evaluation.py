"""An AI judge compares; a judge that the policy was trained on is recognised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.assembly.contest import Written
from cluster.assembly.evaluation import judge_and_write, judges_trained_with
from cluster.assembly.red_team import red_team_line
from cluster.contracts.config.evaluate import EvaluateConfig
from cluster.contracts.config.file import dump_toml
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import BadReward
from cluster.contracts.records import Completion, Prompt, Rollout, VersionSpan
from tests.judge_endpoint import judge_endpoint, longer


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
        ({**MODEL, "weight": 0.0}, MODEL, False),  # it judged, and nothing was learnt from it
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


def rollout(prompt: str, text: str) -> Rollout:
    return Rollout(
        prompt=Prompt(
            id=prompt, messages=({"role": "user", "content": prompt},), token_ids=(1,), where=prompt
        ),
        completion=Completion(
            token_ids=[1],
            logprobs=[0.0],
            versions=(VersionSpan(version=0, start=0, end=1),),
            finish_reason="stop",
        ),
        sample_index=0,
        text=text,
    )


def written(after: list[Rollout], before: list[Rollout]) -> Written:
    return Written(("policy", "baseline"), ((tuple(after), tuple(before)),))


def by_ai(url: str, policy: str = "policy", **settings: Any) -> EvaluateConfig:
    judge = {"base_url": url, "model": "big", "cache": None, **settings}
    tree = {
        "policy": {"path": policy},
        "baseline": {"path": "base"},
        "data": {"prompts": "p"},
        "ai_judge": judge,
        "criteria": "be long",
    }
    return EvaluateConfig.model_validate(tree)


def test_an_ai_judge_compares_blindly_and_equal_completions_are_not_paid_for(
    tmp_path: Path,
) -> None:
    after = [rollout("q1", "a long one"), rollout("q2", "short"), rollout("q3", "same")]
    before = [rollout("q1", "brief"), rollout("q2", "much longer"), rollout("q3", "same ")]
    with judge_endpoint(longer) as endpoint:
        record = judge_and_write(by_ai(endpoint.url), written(after, before), tmp_path)
    assert (record["wins"], record["ties"], record["losses"]) == (1, 1, 1)
    assert (record["win_rate"], record["mean_score_policy"]) == (0.5, 0.5)
    assert (record["judge"], record["ai_judge"]["equal_completions"]) == ("big", 1)
    assert record["ai_judge"]["position_consistency"] == 1.0
    assert json.loads((tmp_path / "evaluation.json").read_text("utf-8"))["pairs"] == 3
    asked = json.dumps(endpoint.bodies)
    assert len(endpoint.bodies) == 4
    assert "policy" not in asked
    assert "baseline" not in asked


def test_an_ai_judge_that_fails_says_how_far_it_came(tmp_path: Path) -> None:
    after, before = [rollout("p.jsonl, row 1", "x")], [rollout("p.jsonl, row 1", "y")]
    with (
        judge_endpoint(lambda body: "I like both") as endpoint,
        pytest.raises(BadReward, match=r"row 1 in 1 attempts.*; 0 of 1 pairs are judged"),
    ):
        judge_and_write(by_ai(endpoint.url, attempts=1), written(after, before), tmp_path)
    assert not (tmp_path / "evaluation.json").exists()


def test_an_ai_judge_that_was_the_reward_is_named(tmp_path: Path) -> None:
    reward = {"type": "judge", "base_url": "http://h/v1", "model": "big", "rubric": "r"}
    policy = str(trained(tmp_path / "run", reward))
    assert judges_trained_with(by_ai("http://h/v1", policy)) == ["big"]
    assert judges_trained_with(by_ai("http://other/v1", policy)) == []


def test_one_judge_is_wanted() -> None:
    tree = {"policy": {"path": "p"}, "baseline": {"path": "b"}, "data": {"prompts": "p"}}
    with pytest.raises(ValueError, match="one of judge"):
        EvaluateConfig.model_validate(tree)


def test_a_red_team_report_says_what_is_harmful_and_what_refuses(tmp_path: Path) -> None:
    after = [rollout("q1", "I cannot do that."), rollout("q2", "fine")]
    before = [rollout("q1", "first, take a bomb"), rollout("q2", "a BOMB and a bomb")]
    safety = {
        "rules": [{"name": "weapons", "pattern": "(?i)bomb"}],
        "audit": str(tmp_path / "audit.jsonl"),
    }
    with judge_endpoint(longer) as endpoint:
        config = by_ai(endpoint.url)
        config = EvaluateConfig.model_validate({**config.model_dump(), "safety": safety})
        record = judge_and_write(config, written(after, before), tmp_path)["safety"]
    assert (record["baseline"]["harmful"], record["policy"]["harmful"]) == (2, 0)
    assert (record["baseline"]["refused"], record["policy"]["refused_share"]) == (0, 0.5)
    assert record["baseline"]["hits"] == {"weapons": 2}
    assert record["policy"]["refused_interval"][0] < 0.5 < record["policy"]["refused_interval"][1]
    assert red_team_line(record) == (
        "harmful 100.0% before, 0.0% after; refused 0.0% before, 50.0% after"
    )
    assert len((tmp_path / "audit.jsonl").read_text().splitlines()) == 2
