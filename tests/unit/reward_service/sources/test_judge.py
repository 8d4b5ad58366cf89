"""An AI judge as a reward: ratings, failures, its key and its cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.contracts.config.reward import JudgeSource, RewardConfig
from cluster.contracts.errors import BadReward, RewardFailure, Unrated, UserError
from reward_service.access import Access, sources_access
from reward_service.composition import build, check_source
from reward_service.source import ScoreItem
from tests.judge_endpoint import JudgeEndpoint, Raw, judge_endpoint, shown


def words(body: dict[str, Any]) -> str:
    """A judge that counts words."""
    count = len(shown(body, "COMPLETION").split())
    return json.dumps({"reason": "counted", "score": max(1, min(10, count))})


def source(endpoint: JudgeEndpoint, **settings: Any) -> JudgeSource:
    tree = {"base_url": endpoint.url, "model": "m", "rubric": "be long", "cache": None, **settings}
    return JudgeSource(**tree)


def items(*texts: str) -> list[ScoreItem]:
    prompt = ({"role": "user", "content": "q"},)
    return [ScoreItem(id=str(n), messages=prompt, response=t) for n, t in enumerate(texts)]


def rewards(*sources: JudgeSource) -> RewardConfig:
    return RewardConfig.model_validate({"sources": [s.model_dump() for s in sources]})


def test_completions_are_rated_in_their_order_and_equal_ones_once(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache.db")
    with judge_endpoint(words) as endpoint:
        scorer = build(rewards(source(endpoint, cache=cache, weight=0.5)))
        scores = scorer.score(items("one two", "", "one two", "a b c"))
        asked = len(endpoint.bodies)
        again = scorer.score(items("a b c"))
        scorer.close()
    assert [score.value for score in scores] == [1.0, 0.5, 1.0, 1.5]
    assert scores[3].parts == {"judge": 3.0}
    assert (asked, len(endpoint.bodies), again[0].value) == (3, 3, 1.5)


@pytest.mark.parametrize(
    "said", ['{"reason": "r", "score": NaN}', '{"reason": "r", "score": 1e999}', "good", "0"]
)
def test_an_answer_without_a_rating_is_an_error_and_never_a_number(said: str) -> None:
    with judge_endpoint(lambda body: said) as endpoint:
        scorer = build(rewards(source(endpoint, attempts=2)))
        with pytest.raises(Unrated, match="no usable answer about item '0' in 2 attempts"):
            scorer.score(items("x"))
        scorer.close()


def test_a_judge_that_is_down_may_come_back() -> None:
    with judge_endpoint(lambda body: Raw(b"down", 503)) as endpoint:
        scorer = build(rewards(source(endpoint, deadline_s=0.1)))
        with pytest.raises(RewardFailure, match="status 503"):
            scorer.score(items("x"))
        endpoint.answer = words
        assert scorer.score(items("x"))[0].value == 1.0
        scorer.close()


def test_a_spent_budget_ends_the_run_with_its_reason() -> None:
    with judge_endpoint(words) as endpoint:
        scorer = build(rewards(source(endpoint, max_requests=1)))
        with pytest.raises(BadReward, match="budget is spent"):
            scorer.score(items("x", "y z"))
        scorer.close()


def test_the_key_is_read_where_the_command_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-1")
    with judge_endpoint(words) as endpoint:
        config = rewards(source(endpoint, key_env="JUDGE_KEY"))
        access = sources_access(config)
        monkeypatch.delenv("JUDGE_KEY")
        scorer = build(config, remote=access)
        scorer.score(items("x"))
        scorer.close()
        assert endpoint.keys == ["Bearer sk-1"]
        assert access == {"judge": Access(token="sk-1")}
        assert "sk-1" not in repr(access)
        with pytest.raises(UserError, match="JUDGE_KEY is not set"):
            check_source(source(endpoint, key_env="JUDGE_KEY"), [])


def test_the_version_changes_with_the_rubric_and_the_model() -> None:
    with judge_endpoint(words) as endpoint:
        versions = set()
        for settings in ({}, {"rubric": "be short"}, {"model": "other"}, {"temperature": 0.5}):
            scorer = build(rewards(source(endpoint, **settings)))
            versions.add(scorer.version)
            scorer.close()
    assert len(versions) == 4


def test_a_local_model_is_no_reward_source() -> None:
    with pytest.raises(ValueError, match="vllm serve"):
        JudgeSource(engine="vllm", model="m", rubric="r")
