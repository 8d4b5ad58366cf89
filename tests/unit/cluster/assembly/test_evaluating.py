"""The judge of an evaluation in the driver: scores, win rate against the start, its failures."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from cluster.assembly.evaluating import DriverJudge, judge_was_reward
from cluster.assembly.prepare import prepare
from cluster.contracts.config.evaluation import EvaluationConfig
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import AccordError, BadReward, UserError
from cluster.contracts.records import Rollout, Score
from cluster.runs.evaluations import samples_file
from learner.models.tiny import fresh_model, train_tokenizer
from tests.pool_world import prompt_of, written

ROLLOUTS = [written(prompt_of(at), sample, 0) for at in range(8) for sample in (0, 1)]


def scored(shift: float = 0.0) -> object:
    def scores(rollouts: Sequence[Rollout]) -> list[Score]:
        return [
            Score(value=len(r.prompt.id) + r.sample_index + shift, scorer_version="x")
            for r in rollouts
        ]

    return scores


def judge(run_dir: Path, scores: object) -> DriverJudge:
    return DriverJudge("gold", False, scores, run_dir, seed=0)  # type: ignore[arg-type]


def test_the_start_is_the_baseline_also_of_a_resumed_run(tmp_path: Path) -> None:
    first = asyncio.run(judge(tmp_path, scored()).judge(0, ROLLOUTS))
    assert (first.score, first.win_rate) == (2.5, None)
    later = asyncio.run(judge(tmp_path, scored(0.5)).judge(5, ROLLOUTS))  # another process
    assert (later.score, later.win_rate) == (3.0, 1.0)
    assert later.ci_low is not None
    assert later.ci_low > 0.6
    same = asyncio.run(judge(tmp_path, scored()).judge(10, ROLLOUTS))
    assert same.win_rate == 0.5  # every pair a tie
    assert len(samples_file(tmp_path, 5).read_text().splitlines()) == len(ROLLOUTS)


def test_without_the_start_there_is_no_win_rate(tmp_path: Path) -> None:
    found = asyncio.run(judge(tmp_path, scored()).judge(5, ROLLOUTS))
    assert (found.score, found.win_rate) == (2.5, None)


@pytest.mark.parametrize("problem", [BadReward("not a number"), ZeroDivisionError("by zero")])
def test_whatever_the_judge_raises_is_told(tmp_path: Path, problem: Exception) -> None:
    def scores(rollouts: Sequence[Rollout]) -> list[Score]:
        raise problem

    with pytest.raises(AccordError, match=str(problem)):
        asyncio.run(judge(tmp_path, scores).judge(5, ROLLOUTS))


def test_a_judge_that_hangs_is_not_asked_again(tmp_path: Path) -> None:
    go_on = threading.Event()

    def scores(rollouts: Sequence[Rollout]) -> list[Score]:
        go_on.wait(60)
        return scored()(rollouts)  # type: ignore[operator,no-any-return]

    async def scene() -> None:
        slow = judge(tmp_path, scores)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(slow.judge(5, ROLLOUTS), 0.05)
        with pytest.raises(AccordError, match="still busy with step 5"):
            await slow.judge(10, ROLLOUTS)
        go_on.set()

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("judges", "same"),
    [
        (None, True),
        ([{"type": "function", "path": "rewards.py:short", "name": "other"}], True),
        ([{"type": "function", "path": "rewards.py:gold"}], False),
        ([{"type": "function", "path": "rewards.py:second"}], False),  # its weight is 0
    ],
)
def test_a_judge_that_is_the_reward_is_known(
    judges: list[dict[str, str]] | None, same: bool
) -> None:
    tree = {
        "model": {"path": "m"},
        "data": {"prompts": "p.jsonl"},
        "reward": {
            "sources": [
                {"type": "function", "path": "rewards.py:short"},
                {"type": "function", "path": "rewards.py:second", "name": "s", "weight": 0.0},
            ]
        },
        "evaluation": {"every": 5, "prompts": "h.jsonl"},
    }
    if judges is not None:
        tree["evaluation"]["judge"] = {"sources": judges}
    assert judge_was_reward(TrainConfig.model_validate(tree)) is same


def rows(path: Path, texts: Sequence[str]) -> str:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), "utf-8")
    return str(path)


def test_held_out_prompts_that_are_trained_on_are_left_out_and_counted(
    tmp_path: Path,
) -> None:
    tokenizer = train_tokenizer(["w2 w3 w4 w5 w6"] * 3, 300, tmp_path / "tokenizer")
    sizes = {"hidden": 32, "layers": 1, "heads": 2, "intermediate": 32}
    tiny = fresh_model(tokenizer, tmp_path / "policy", **sizes)
    tree = {
        "model": {"path": str(tiny)},
        "data": {"prompts": rows(tmp_path / "train.jsonl", ["w2 w3", "w4 w5", "w6"])},
        "reward": {"sources": [{"type": "rules", "required": ["a"]}]},
        "rollout": {"max_tokens": 8},
        "evaluation": {
            "every": 5,
            "prompts": rows(tmp_path / "held_out.jsonl", ["w4  w5 ", "w3 w2", "w5", "w6"]),
            "max_prompts": 1,
        },
    }
    found = prepare(TrainConfig.model_validate(tree))
    assert [prompt.messages[0]["content"] for prompt in found.held_out] == ["w3 w2"]
    assert found.leaked == 2
    rows(tmp_path / "held_out.jsonl", ["w4 w5", "w6"])
    with pytest.raises(UserError, match="all 2 prompts are training prompts, too"):
        prepare(TrainConfig.model_validate(tree))


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"every": 5}, "set evaluation.prompts"),
        ({"every": 5, "prompts": "p", "metric": "win_rate", "start": False}, "evaluation.start"),
        ({"every": 5, "prompts": "p", "result": "best", "keep_best": False}, "keep_best = true"),
        ({"patience": 2}, "evaluation.patience counts evaluations"),
    ],
)
def test_what_does_not_fit_together_is_told(section: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        EvaluationConfig.model_validate(section)
