"""People judge an evaluation: its items, waiting, going on, and what their answers come to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.assembly import evaluation
from cluster.assembly.contest import Written, comparisons, write_completions
from cluster.assembly.evaluation import run_evaluation
from cluster.assembly.judged_comparisons import Judged
from cluster.assembly.people_evaluation import judge_by_people
from cluster.contracts.config.evaluate import EvaluateConfig
from cluster.contracts.errors import Resumable, UserError
from cluster.runs.console import Reporter
from reward_service.preferences.records import Item, Judgement, derived_id
from reward_service.preferences.store import PreferenceStore
from tests.judge_endpoint import judge_endpoint, longer
from tests.unit.cluster.assembly.test_contest import table

QUIET = Reporter(quiet=True)


@pytest.fixture
def settings(tmp_path: Path) -> EvaluateConfig:
    tree: dict[str, Any] = {
        "policy": {"path": "runs/p"},
        "baseline": {"path": "runs/b"},
        "data": {"prompts": "p"},
        "people": {"store": str(tmp_path / "eval.db"), "wait": False},
    }
    return EvaluateConfig.model_validate(tree)


def world() -> Written:
    return table(policy=["good 0", "good 1", "good 2", "same"], baseline=["x0", "x1", "x2", "same"])


def judge(config: EvaluateConfig, written: Written, **more: Any) -> Judged:
    return judge_by_people(config, "key", written, comparisons(written, [(0, 1)]), QUIET, **more)


def answer(store: PreferenceStore, item: Item, who: str, said: str, **more: Any) -> None:
    """``said``: the beginning of the completion that is preferred, or tie, skip, all_bad."""
    fields: dict[str, Any] = {"answer": said}
    if said not in ("skip", "flag", "all_bad"):
        best = [one.text.startswith(said) for one in item.completions]
        fields = {"answer": "ranking", "ranks": tuple(1 if one else 2 for one in best)}
    store.add_judgement(
        Judgement(
            id=derived_id(item.id, who),
            item_id=item.id,
            annotator_id=who,
            consent="yes",
            created_at="2027-01-01T00:00:00+00:00",
            shown_order="ab",
            **fields,
        )
    )


def test_the_items_say_who_wrote_what_and_their_order_does_not(settings: EvaluateConfig) -> None:
    with pytest.raises(Resumable, match=r"judged 0 of 3 pairs.*accord label .*eval\.db"):
        judge(settings, world())
    assert settings.people is not None
    items = PreferenceStore(settings.people.store).items()
    assert len(items) == 3  # equal completions are a tie that nobody is asked about
    for item in items:
        for one in item.completions:
            mine = one.text.startswith("good")
            assert one.policy_version == ("policy" if mine else "baseline")
            assert one.run == ("runs/p" if mine else "runs/b")
            assert one.sampling is not None
        assert item.topic in ("even", "odd")
    firsts = {one.completions[0].policy_version for one in items}
    assert firsts == {"policy", "baseline"}


def test_the_command_goes_on_where_people_are(settings: EvaluateConfig) -> None:
    with pytest.raises(Resumable):
        judge(settings, world())
    assert settings.people is not None
    store = PreferenceStore(settings.people.store)
    items = store.items()
    answer(store, items[0], "ann", "good")
    with pytest.raises(Resumable, match="judged 1 of 3"):
        judge(settings, world())
    answer(store, items[1], "ann", "x")
    answer(store, items[2], "ann", "skip")
    judged = judge(settings, world())
    order = {item.messages[0]["content"]: place for place, item in enumerate(items)}
    expected = {0: (1.0, 0.0), 1: (0.0, 1.0), 2: None}
    assert list(judged.scores) == [
        *(expected[order[f"q{n}"]] for n in range(3)),
        (0.5, 0.5),
    ]
    people = judged.record["people"]
    assert (people["items"], people["labels"], people["skips_and_flags"]) == (3, 2, 1)
    assert len(store.items()) == 3


def test_it_waits_until_every_pair_has_its_labels(settings: EvaluateConfig) -> None:
    assert settings.people is not None
    people = settings.people.model_copy(update={"wait": True, "labels": 2})
    config = settings.model_copy(update={"people": people})
    store = PreferenceStore(people.store)
    turns = iter([("ann", "good"), ("bob", "good"), ("cat", "x")])
    slept = []

    def sleep(seconds: float) -> None:
        """Whoever comes judges all items; a third annotator is not waited for."""
        slept.append(seconds)
        who, said = next(turns)
        for item in store.items():
            answer(store, item, who, said)

    judged = judge(config, world(), sleep=sleep)
    assert len(slept) == 2
    assert list(judged.scores) == [(1.0, 0.0)] * 3 + [(0.5, 0.5)]
    assert judged.record["people"]["agreement"]["percent_agreement"] == 1.0
    assert judged.record["people"]["annotators"] == 2


def test_annotators_who_disagree_are_a_tie(settings: EvaluateConfig) -> None:
    assert settings.people is not None
    store = PreferenceStore(settings.people.store)
    with pytest.raises(Resumable):
        judge(settings, world())
    for item in store.items():
        answer(store, item, "ann", "good")
        answer(store, item, "bob", "all_bad" if item.topic == "odd" else "x")
    judged = judge(settings, world())
    assert list(judged.scores) == [(0.5, 0.5), (0.75, 0.25), (0.5, 0.5), (0.5, 0.5)]


@pytest.fixture
def sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The run directories for which completions were sampled; nothing is."""
    found: list[Path] = []

    def sample(config: Any, prompts: Any, directory: Path, reporter: Reporter) -> Written:
        found.append(directory)
        write_completions(directory, world())
        return world()

    monkeypatch.setattr(evaluation, "_ready", lambda config: config)
    monkeypatch.setattr(evaluation, "prompts_of", lambda config, say: [[]])
    monkeypatch.setattr(evaluation, "_sampled", sample)
    for name in ("p", "b"):
        (tmp_path / name).mkdir()
    return found


def whole(tmp_path: Path, **more: Any) -> EvaluateConfig:
    (tmp_path / "prompts.jsonl").touch()
    tree: dict[str, Any] = {
        "run": {"dir": str(tmp_path / "runs")},
        "policy": {"path": str(tmp_path / "p")},
        "baseline": {"path": str(tmp_path / "b")},
        "data": {"prompts": str(tmp_path / "prompts.jsonl")},
        **more,
    }
    return EvaluateConfig.model_validate(tree)


def test_the_same_command_goes_on_without_sampling(tmp_path: Path, sampled: list[Path]) -> None:
    people = {"store": str(tmp_path / "eval.db"), "wait": False}
    with pytest.raises(Resumable):
        run_evaluation(whole(tmp_path, people=people), QUIET)
    (run,) = sampled
    assert json.loads((run / "manifest.json").read_text())["status"] == "waiting"
    store = PreferenceStore(people["store"])  # type: ignore[arg-type]
    for item in store.items():
        answer(store, item, "ann", "good")
    assert run_evaluation(whole(tmp_path, people={**people, "wait": True}), QUIET) == run
    assert sampled == [run]
    record = json.loads((run / "evaluation.json").read_text())
    assert (record["win_rate"], record["ties"]) == (0.875, 1)
    assert json.loads((run / "manifest.json").read_text())["status"] == "finished"
    assert (run / "report.html").exists()


def test_another_policy_under_the_same_path_is_another_evaluation(
    tmp_path: Path, sampled: list[Path]
) -> None:
    people = {"store": str(tmp_path / "eval.db"), "wait": False}
    for name in ("one", "two"):
        (tmp_path / "p" / "model.safetensors").write_text(name)
        config = whole(tmp_path, people=people, run={"dir": str(tmp_path), "name": name})
        with pytest.raises(Resumable):
            run_evaluation(config, QUIET)
    assert [path.name for path in sampled] == ["one", "two"]
    assert len(PreferenceStore(tmp_path / "eval.db").items()) == 6


def test_completions_survive_a_judge_that_may_ask_no_more(
    tmp_path: Path, sampled: list[Path]
) -> None:
    with judge_endpoint(longer) as endpoint:
        judge = {"base_url": endpoint.url, "model": "big", "cache": None}
        with pytest.raises(UserError, match="max_requests"):
            run_evaluation(whole(tmp_path, ai_judge={**judge, "max_requests": 2}), QUIET)
        (run,) = sampled
        assert (run / "completions.jsonl").exists()
