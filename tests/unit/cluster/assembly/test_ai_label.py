"""`accord ai-label`: what it reads, what it stores, how it goes on, and what it reports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.assembly.ai_label import FIGURES, run_ai_label
from cluster.contracts.config.ai_label import AiLabelConfig
from cluster.contracts.config.file import check_config
from cluster.contracts.errors import Resumable, UserError
from cluster.runs.console import Reporter
from reward_service.judge.labelling import ranks_of
from reward_service.preferences.records import Judgement
from reward_service.preferences.store import PreferenceStore
from tests.judge_endpoint import JudgeEndpoint, Raw, judge_endpoint, longer, shown


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(path: Path, count: int = 4) -> str:
    """Of the last, the shorter completion is preferred."""
    rows = [
        {"prompt": f"question {n}", "chosen": "a long answer" * (n + 1), "rejected": "short"}
        for n in range(count)
    ]
    last = rows[-1]
    last["chosen"], last["rejected"] = last["rejected"], last["chosen"]
    return write_rows(path, rows)


def label(
    endpoint: JudgeEndpoint, folder: Path, data: str, name: str = "r", **settings: Any
) -> tuple[dict[str, Any], list[Judgement]]:
    judge = {"base_url": endpoint.url, "model": "org/judge-1", "cache": str(folder / "cache.db")}
    tree = {
        "run": {"dir": str(folder / "runs"), "name": name},
        "data": {"path": data},
        "store": str(folder / "p.db"),
        **settings,
        "judge": {**judge, "concurrency": 1, **settings.get("judge", {})},
    }
    run = run_ai_label(check_config(AiLabelConfig, tree, where="t"), Reporter(quiet=True))
    figures = json.loads((run / FIGURES).read_text("utf-8"))
    return figures, PreferenceStore(folder / "p.db").judgements()


def test_pairs_are_judged_stored_and_compared_with_people(tmp_path: Path) -> None:
    data = pairs(tmp_path / "pairs.jsonl")
    with judge_endpoint(longer) as endpoint:
        figures, stored = label(endpoint, tmp_path, data, judge={"prompt_price": 1.0})
        again, stored_again = label(endpoint, tmp_path, data, "again")
        requests = len(endpoint.bodies)
    mine = [entry for entry in stored if entry.source == "ai"]
    assert len(mine) == 4
    assert {entry.annotator_id for entry in mine} == {figures["annotator_id"]}
    assert figures["annotator_id"].startswith("ai-judge-1-")
    assert mine[0].judge == {
        "model": "org/judge-1",
        "place": endpoint.url,
        "prompt_sha256": figures["judge"]["prompt_sha256"],
    }
    people = figures["agreement_with_people"]
    assert (people["items"], people["votes"], people["share"]) == (4, 4, 0.75)
    assert people["share_interval"][0] < 0.75 < people["share_interval"][1]
    assert figures["position_consistency"] == 1.0
    assert figures["spent"]["requests"] == 8
    assert figures["spent"]["cost"] == pytest.approx(8 * 100 / 1e6)
    assert (again["judged"], again["judged_before"], requests) == (0, 4, 8)
    assert stored_again == stored


def test_other_criteria_are_another_judge(tmp_path: Path) -> None:
    data = pairs(tmp_path / "pairs.jsonl", 2)
    with judge_endpoint(longer) as endpoint:
        label(endpoint, tmp_path, data)
        figures, stored = label(endpoint, tmp_path, data, "other", criteria="be brief")
    assert figures["judged"] == 2
    assert len({entry.annotator_id for entry in stored if entry.source == "ai"}) == 2


def test_sampled_completions_become_pairs_of_each_prompt(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    texts = ("one", "three", "one", "fourteen", "x", "y" * 9)  # "one" twice: y has no partner
    rows = [
        {
            "prompt": messages,
            "completion": [{"role": "assistant", "content": text}],
            "sample": n,
            "finish_reason": "stop",
        }
        for n, text in enumerate(texts)
    ]
    rows.append({"prompt": "alone", "completion": "only one"})
    with judge_endpoint(longer) as endpoint:
        figures, stored = label(endpoint, tmp_path, write_rows(tmp_path / "c.jsonl", rows))
    items = {item.id: item for item in PreferenceStore(tmp_path / "p.db").items()}
    assert figures["items"] == 2
    preferred = {
        items[entry.item_id].completions["ab".index(entry.choice)].text for entry in stored
    }
    assert preferred == {"three", "fourteen"}
    assert figures["agreement"] == "no person has judged these items"


def test_a_file_without_pairs_is_refused(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "c.jsonl", [{"prompt": "a", "completion": "b"}])
    with judge_endpoint(longer) as endpoint, pytest.raises(UserError, match="no prompt with two"):
        label(endpoint, tmp_path, data)


def test_a_judge_that_goes_away_loses_nothing(tmp_path: Path) -> None:
    data = pairs(tmp_path / "pairs.jsonl")

    def dies(body: dict[str, Any]) -> str | Raw:
        return longer(body) if len(endpoint.bodies) <= 5 else Raw(b"down", 503)

    with judge_endpoint(dies) as endpoint:
        with pytest.raises(Resumable, match="2 of 4 items are judged and stored") as stopped:
            label(endpoint, tmp_path, data, judge={"deadline_s": 0.1})
        assert "same command" in str(stopped.value)
        endpoint.answer = longer
        before = len(endpoint.bodies)
        figures, stored = label(endpoint, tmp_path, data, "again")
    assert (figures["judged"], figures["judged_before"]) == (2, 2)
    assert len(endpoint.bodies) - before == 3  # of the third item, one answer was in the cache
    assert sum(entry.source == "ai" for entry in stored) == 4


def test_a_spent_budget_says_how_far_it_came(tmp_path: Path) -> None:
    data = pairs(tmp_path / "pairs.jsonl")
    with (
        judge_endpoint(longer) as endpoint,
        pytest.raises(UserError, match=r"budget is spent.*1 of 4 items"),
    ):
        label(endpoint, tmp_path, data, judge={"max_requests": 3})


def test_rankings_are_judged_pair_by_pair(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completions": ["bb", "cccc", "d"], "ranks": [2, 1, 3]}]
    data = write_rows(tmp_path / "r.jsonl", rows)
    with judge_endpoint(longer) as endpoint:
        figures, stored = label(endpoint, tmp_path, data)
    item = PreferenceStore(tmp_path / "p.db").items()[0]
    [mine] = [entry for entry in stored if entry.source == "ai"]
    ranks = {c.text: rank for c, rank in zip(item.completions, mine.ranks, strict=True)}
    assert ranks == {"cccc": 1, "bb": 2, "d": 3}
    assert (figures["verdicts"], figures["agreement_with_people"]["share"]) == (3, 1.0)
    assert len(mine.criteria["verdicts"]) == 3


def test_a_circle_of_verdicts_is_a_tie() -> None:
    assert ranks_of(3, {(0, 1): "a", (1, 2): "a", (0, 2): "b"}) == (1, 1, 1)
    assert ranks_of(3, {(0, 1): "a", (1, 2): "tie", (0, 2): "a"}) == (1, 2, 2)


def test_the_judge_sees_the_prompt_and_the_criteria(tmp_path: Path) -> None:
    data = pairs(tmp_path / "pairs.jsonl", 1)
    with judge_endpoint(longer) as endpoint:
        label(endpoint, tmp_path, data, criteria="only {this}")
    assert "only {this}" in endpoint.bodies[0]["messages"][0]["content"]
    assert shown(endpoint.bodies[0], "PROMPT") == "question 0"
