"""Which completions are compared, and what becomes of the judgements."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.assembly.contest import (
    Written,
    comparisons,
    next_turn,
    pairings,
    read_completions,
    turn_prompt,
    write_completions,
)
from cluster.assembly.evaluation import judge_and_write
from cluster.assembly.judged_comparisons import Judged, evaluation_record, result_line
from cluster.contracts.config.evaluate import EvaluateConfig, name_of
from cluster.contracts.errors import UserError
from cluster.contracts.records import Completion, Prompt, Rollout, VersionSpan
from tests.judge_endpoint import judge_endpoint, longer, shown


def rollout(question: str, text: str, **metadata: Any) -> Rollout:
    return Rollout(
        prompt=Prompt(
            id=question,
            messages=({"role": "user", "content": question},),
            token_ids=(1, 2),
            metadata=metadata,
            where=f"p.jsonl, {question}",
        ),
        completion=Completion(
            token_ids=[1],
            logprobs=[-0.25],
            versions=(VersionSpan(version=0, start=0, end=1),),
            finish_reason="stop",
        ),
        sample_index=0,
        text=text,
    )


def second_turn(first: Rollout, text: str) -> Rollout:
    messages = next_turn(first, 1)
    assert messages is not None
    return replace(first, prompt=turn_prompt(first, 1, messages, [1, 2, 3]), text=text)


def config(*names: str, baseline: bool = False, **more: Any) -> EvaluateConfig:
    tree: dict[str, Any] = {"data": {"prompts": "p"}, "judge": {"sources": [{"type": "rules"}]}}
    tree |= {"policies": [{"path": f"runs/{name}/policy"} for name in names]}
    if baseline:
        tree["baseline"] = {"path": "base"}
    tree |= more
    return EvaluateConfig.model_validate({k: v for k, v in tree.items() if v is not None})


def table(**texts: list[str]) -> Written:
    """By policy: its completions for the questions q0, q1, ..."""
    policies = [
        tuple(rollout(f"q{n}", text, category=("even", "odd")[n % 2]) for n, text in enumerate(own))
        for own in texts.values()
    ]
    return Written(tuple(texts), (tuple(policies),))


def test_every_two_or_each_against_the_baseline() -> None:
    assert pairings(3, against_last=False) == [(0, 1), (0, 2), (1, 2)]
    assert pairings(3, against_last=True) == [(0, 2), (1, 2)]
    assert list(config("a", "b", baseline=True).contestants) == ["a", "b", "baseline"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/a/policy", "a"),
        ("runs/a", "a"),
        ("runs/a/checkpoints/step-000010/policy", "a/step-000010"),
        ("org/model", "model"),
        ("model", "model"),
    ],
)
def test_a_policy_is_called_by_its_run(path: str, name: str) -> None:
    assert name_of(path) == name


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"policies": [{"path": "x/policy"}]}, "a second one"),
        ({"policies": ["runs/a/policy", "old/a"]}, "are called 'a'"),
        ({"policy": {"path": "p"}}, "not both"),
        ({"policies": []}, "give policy and baseline, or policies"),
        ({"people": {"store": "e.db"}}, "give one of judge"),
    ],
)
def test_what_cannot_be_compared(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config("a", "b", **more)


def test_completions_are_read_as_they_were_written(tmp_path: Path) -> None:
    first = [rollout("q", text, later_turns=["and?"]) for text in ("one", "two")]
    second = [second_turn(one, one.text * 2) for one in first]
    written = Written(("a", "b"), (((first[0],), (first[1],)), ((second[0],), (second[1],))))
    write_completions(tmp_path, written)
    assert read_completions(tmp_path, ("a", "b")) == written
    row = json.loads((tmp_path / "completions.jsonl").read_text().splitlines()[0])
    assert (row["completion"], row["policy_version"]) == ("one", "a")


def test_a_later_turn_is_compared_with_all_that_was_said_since_the_prompt() -> None:
    first = [rollout("q", text, later_turns=["and?"], later_references=["R2"]) for text in "ab"]
    assert next_turn(rollout("q", "x"), 1) is None
    assert next_turn(first[0], 2) is None
    second = [second_turn(one, one.text.upper()) for one in first]
    written = Written(("x", "y"), (((first[0],), (first[1],)), ((second[0],), (second[1],))))
    one, other = comparisons(written, [(0, 1)])
    assert (one.a, one.b, one.turn, one.reference) == ("a", "b", 0, "")
    assert other.messages == one.messages == ({"role": "user", "content": "q"},)
    assert other.a == "a\n\nUser: and?\n\nAssistant: A"
    assert (other.question, other.reference, other.place) == ("q", "R2", 1)
    assert second[0].prompt.messages[1:] == (
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "and?"},
    )


def test_a_ranking_with_categories_and_every_pair() -> None:
    written = table(
        long=["x" * 30, "x" * 31, "x" * 32, "x" * 33],
        middle=["x" * 20] * 3 + ["x" * 33],
        short=["x"] * 4,
    )
    settings = config("long", "middle", "short")
    compared = comparisons(written, pairings(3, against_last=False))
    scores = [(float(len(c.a)), float(len(c.b))) for c in compared]
    record = evaluation_record(settings, written, compared, Judged(scores, {"judge": "length"}))
    assert [one["policy"] for one in record["ranking"]] == ["long", "middle", "short"]
    assert [one["win_rate"] for one in record["ranking"]] == [7.5 / 8, 4.5 / 8, 0]
    pairs = {(one["policy"], one["baseline"]): one for one in record["comparisons"]}
    assert pairs["long", "middle"]["ties"] == 1
    assert pairs["middle", "short"]["win_rate"] == 1.0
    assert set(record["categories"]) == {"even", "odd"}
    assert record["categories"]["odd"]["long"]["wins"] == 3
    assert "win_rate" not in record
    assert result_line(record).startswith("rating (95 % interval): 1. long +")


def test_what_was_not_judged_does_not_count() -> None:
    written = table(policy=["x", "yy"], baseline=["y", "xx"])
    compared = comparisons(written, [(0, 1)])
    judged = Judged([(1.0, 0.0), None], {"judge": "people"})
    record = evaluation_record(
        config(policies=None, policy={"path": "a"}, baseline={"path": "b"}),
        written, compared, judged,
    )  # fmt: skip
    assert (record["pairs"], record["not_judged"], record["wins"]) == (1, 1, 1)
    with pytest.raises(UserError, match="no comparison has a label"):
        evaluation_record(
            config("policy", "b", baseline=True), written, compared, Judged([None, None], {})
        )


def test_an_ai_judge_ranks_several_and_sees_the_reference(tmp_path: Path) -> None:
    one = [rollout("q", text, reference="the truth") for text in ("long text", "text", "t")]
    written = Written(("a", "b", "c"), (tuple((r,) for r in one),))
    with judge_endpoint(longer) as endpoint:
        judge = {"base_url": endpoint.url, "model": "big", "cache": None}
        settings = config("a", "b", "c", judge=None, ai_judge=judge)
        record = judge_and_write(settings, written, tmp_path)
    assert [entry["policy"] for entry in record["ranking"]] == ["a", "b", "c"]
    assert record["ai_judge"]["with_reference"] == 3
    assert {shown(body, "REFERENCE") for body in endpoint.bodies} == {"the truth"}
    assert "known to be correct" in endpoint.bodies[0]["messages"][0]["content"]
    assert not (tmp_path / "samples.jsonl").exists()
