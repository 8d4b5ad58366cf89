"""Which completions best-of-n keeps, what it writes, and what it says of the KL."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest

from cluster.assembly.best_of_n import Scored, best, headline, kl_bound, write_best
from cluster.contracts.config.best_of_n import BestOfNConfig
from cluster.contracts.config.file import check_config
from cluster.contracts.errors import UserError
from cluster.contracts.records import Completion, Prompt, Rollout, Score, VersionSpan
from learner.offline.datasets import read_demonstrations


def scored(
    text: str,
    value: float,
    index: int = 0,
    end: Literal["stop", "length"] = "stop",
    name: str = "p",
) -> Scored:
    tokens = len(text.split()) + 1
    completion = Completion(
        token_ids=[1] * tokens,
        logprobs=[-1.0] * tokens,
        versions=(VersionSpan(version=0, start=0, end=tokens),),
        finish_reason=end,
    )
    prompt = Prompt(
        id=name,
        messages=({"role": "user", "content": name},),
        token_ids=(5,),
        metadata={"topic": 1},
    )
    rollout = Rollout(prompt=prompt, completion=completion, sample_index=index, text=text)
    return Scored(rollout, Score(value=value, parts={"model": value}, scorer_version="v"))


def config(**settings: Any) -> BestOfNConfig:
    tree = {
        "model": {"path": "m"},
        "data": {"prompts": "p"},
        "reward": {"sources": [{"type": "rules", "max_words": 5}]},
        **settings,
    }
    return check_config(BestOfNConfig, tree, where="t")


def texts(kept: list[Scored]) -> list[str]:
    return [one.rollout.text for one in kept]


def test_the_best_is_whole_and_the_first_of_equals() -> None:
    group = [
        scored("cut off here", 9.0, 0, "length"),
        scored("good", 2.0, 1),
        scored("as good", 2.0, 2),
        scored("good", 2.0, 3),
        scored("bad", -1.0, 4),
    ]
    assert texts(best(group, 1, None)) == ["good"]
    assert best(group, 1, None)[0].rollout.sample_index == 1
    assert texts(best(group, 9, None)) == ["good", "as good", "bad"]
    assert texts(best(group, 0, 0.0)) == ["good", "as good"]
    assert best(group, 1, 2.5) == []


def test_files_figures_and_that_sft_reads_what_was_kept(tmp_path: Path) -> None:
    everything = [
        scored("a b c", 0.0, 0, name="p"),
        scored("yes", 1.0, 1, name="p"),
        scored("no", -4.0, 0, "length", name="q"),
        scored("no", -5.0, 1, "length", name="q"),
    ]
    figures = write_best(tmp_path, everything, config(samples=2))
    assert json.loads((tmp_path / "best_of_n.json").read_text()) == figures
    assert figures["kl_bound"] == pytest.approx(math.log(2) - 0.5)
    counts = [figures[k] for k in ("prompts", "prompts_without", "completions", "cut", "kept")]
    assert counts == [2, 1, 4, 2, 1]
    assert (figures["mean_score"], figures["mean_score_kept"]) == (-2.0, 1.0)
    assert (figures["mean_tokens"], figures["mean_tokens_kept"]) == (2.5, 2.0)
    assert "kept 1 of 4 completions: mean score +1.000 (all: -2.000); KL" in headline(figures)
    rows = read_demonstrations(str(tmp_path / "best.jsonl")).items
    assert [row.messages[-1]["content"] for row in rows] == ["yes"]
    lines = (tmp_path / "completions.jsonl").read_text().splitlines()
    assert [json.loads(line)["score_parts"] for line in lines][1] == {"model": 1.0}
    assert write_best(tmp_path, everything, config(samples=2, threshold=0))["kl_bound"] is None


def test_nothing_kept_is_an_error_that_leaves_the_scores(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no completion is kept") as problem:
        write_best(
            tmp_path, [scored("a", 0.0), scored("b", 0.5, 1)], config(samples=2, threshold=1)
        )
    assert "lower threshold" in str(problem.value.fix)
    assert (tmp_path / "completions.jsonl").is_file()
    assert not (tmp_path / "best.jsonl").exists()


def _exact_kl(outcomes: int, n: int) -> float:
    """KL of best-of-n to a uniform policy over so many completions of different scores."""
    top = [(i / outcomes) ** n - ((i - 1) / outcomes) ** n for i in range(1, outcomes + 1)]
    return sum(p * math.log(p * outcomes) for p in top)


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_bound_holds_and_is_reached_by_many_completions(n: int) -> None:
    exact = [_exact_kl(outcomes, n) for outcomes in (2, 8, 64, 4096)]
    assert all(kl <= kl_bound(n) + 1e-12 for kl in exact)
    assert exact == sorted(exact)
    assert exact[-1] == pytest.approx(kl_bound(n), rel=1e-2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"keep": 0}, "set threshold"),
        ({"samples": 2, "keep": 2}, "leaves nothing out"),
        (
            {"reward": {"address": "h:1", "sources": [{"type": "rules"}]}},
            "type = 'grpc'",
        ),
    ],
    ids=["all", "none-left-out", "address"],
)
def test_bad_configs(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as problem:
        config(**settings)
    assert said in str(problem.value)
