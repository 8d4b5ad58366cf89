"""The labels of a round: from a function or from people, each of them once, whatever interrupts."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.contracts.config.file import check_config
from cluster.contracts.config.pipeline import PipelineConfig
from cluster.contracts.errors import AccordError, UserError
from cluster.pipeline import labels as labels_module
from cluster.pipeline.labels import RoundLabels, choice_of_round
from cluster.pipeline.record import PipelineRecord
from cluster.pipeline.rounds import Round
from cluster.pipeline.work import Work
from cluster.runs.console import Reporter
from cluster.runs.run import Run
from reward_service.preferences.records import Item, Judgement, utc_now
from reward_service.preferences.store import PreferenceStore

PROMPTS = 12
ANNOTATE = """
def longer(prompt, a, b, **columns):
    assert prompt == [{"role": "user", "content": columns["topic"]}], prompt
    return "a" if len(a) > len(b) else "b"

def several(prompt, a, b, seed, number):
    return {"choice": "both_bad", "annotator": f"robot {number}", "duration_s": 1.5}

def nonsense(prompt, a, b):
    return "first"

def breaks(prompt, a, b):
    raise ZeroDivisionError("no")

calls = []
def interrupted_once(prompt, a, b):
    calls.append(prompt)
    if len(calls) == 5:
        raise KeyboardInterrupt
    return "tie"
"""


def config(label: Mapping[str, Any], **more: Any) -> PipelineConfig:
    tree = {
        "model": {"path": "m"},
        "sample": {"data": {"prompts": "p.jsonl"}, "samples": 4},
        "label": dict(label),
        "dpo": {},
        **more,
    }
    return check_config(PipelineConfig, tree, where="test")


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder / "r"
        at = self.folder / "round-1" / "completions"
        at.mkdir(parents=True)
        rows = [
            {
                "prompt": [{"role": "user", "content": f"question {n}"}],
                "completion": [{"role": "assistant", "content": f"{n} " * (k + 1)}],
                "metadata": {"topic": f"question {n}"},
                "policy_version": "round 0",
                "run": "r",
            }
            for n in range(PROMPTS)
            for k in range(4)
        ]
        (at / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "annotate.py").write_text(ANNOTATE)
        self.annotate = str(folder / "annotate.py")
        self.store = PreferenceStore(self.folder / "preferences.db")

    def at(self, number: int = 1) -> Round:
        return Round(
            number=number,
            folder=self.folder / f"round-{number}",
            start="m",
            before="m",
            record=PipelineRecord(self.folder, 1),
        )

    def labels(self, settings: PipelineConfig) -> RoundLabels:
        reporter = Reporter(quiet=True)
        return RoundLabels(settings, self.at(), self.store.path, reporter)

    def simulated(self, name: str, **more: Any) -> RoundLabels:
        label = {"by": "simulated", "annotate": f"{self.annotate}:{name}"}
        return self.labels(config(label, **more))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def silent(detail: Mapping[str, Any]) -> None:
    """Nobody listens."""


def test_a_function_judges_each_pair_once(world: World) -> None:
    labels = world.simulated("longer", choice={"pairs_per_prompt": 2})
    labels.add_items()
    found = labels.collect(silent)
    assert found == {
        "by": "simulated", "items": 24, "labels": 24, "annotators": 1, "alpha": None
    }  # fmt: skip
    for item, judgement in world.store.judged():
        texts = [c.text for c in item.completions]
        assert texts[judgement.ranks.index(1)] == max(texts, key=len)
        assert (judgement.source, item.source) == ("simulated", "r/round-1")
        assert item.completions[0].policy_version == "round 0"
    before = world.store.judgements()
    labels.add_items()
    assert labels.collect(silent) == found
    assert world.store.judgements() == before


def test_the_share_that_is_asked_twice_is_judged_by_two(world: World) -> None:
    labels = world.simulated("several", choice={"overlap_share": 0.5})
    labels.add_items()
    found = labels.collect(silent)
    assert (found["items"], found["labels"], found["annotators"]) == (12, 18, 2)
    assert Counter(j.annotator_id for j in world.store.judgements()) == {
        "robot 0": 12,
        "robot 1": 6,
    }


def test_an_interrupt_leaves_no_half_of_the_labels(world: World) -> None:
    labels = world.simulated("interrupted_once")
    labels.add_items()
    with pytest.raises(KeyboardInterrupt):
        labels.collect(silent)
    assert world.store.judgements() == []
    again = world.simulated("longer")
    again.add_items()
    assert again.collect(silent)["labels"] == PROMPTS
    assert len(world.store.items()) == PROMPTS


def test_an_end_before_the_choice_is_written_down_doubles_no_item(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(labels_module, "write_text", dies)
        with pytest.raises(KeyboardInterrupt):
            world.simulated("longer").add_items()
    assert len(world.store.items()) == PROMPTS
    world.simulated("longer").add_items()
    assert len(world.store.items()) == PROMPTS


def test_more_pairs_can_be_asked_for(world: World) -> None:
    few = world.simulated("longer", choice={"count": 5})
    few.add_items()
    assert few.collect(silent)["labels"] == 5
    more = world.simulated("longer", choice={"count": 9})
    more.add_items()
    assert more.collect(silent)["items"] == 9


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nonsense", "returned 'first'"),
        ("breaks", "ZeroDivisionError: no"),
        ("absent", "no function"),
    ],
)
def test_a_function_that_is_no_annotator_is_one_message(world: World, name: str, said: str) -> None:
    labels = world.simulated(name)
    labels.add_items()
    with pytest.raises(UserError, match=said):
        labels.collect(silent)
    assert world.store.judgements() == []


def answer(store: PreferenceStore, item: Item, **how: Any) -> None:
    store.add_judgement(
        Judgement(
            **{"id": f"j-{item.id}", "item_id": item.id, "annotator_id": "ann", "consent": "1",
               "created_at": utc_now(), **how}
        )
    )  # fmt: skip


def test_people_are_waited_for_until_every_pair_has_an_answer(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(labels_module, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(labels_module, "GRACE_S", 0.0)
    label = {"by": "people", "server": {"port": 0}}
    labels = world.labels(config(label, choice={"count": 3}))
    labels.add_items()
    told: list[Mapping[str, Any]] = []
    heard = threading.Event()

    def waiting(detail: Mapping[str, Any]) -> None:
        told.append(detail)
        heard.set()

    def people() -> None:
        heard.wait(60)
        first, second, third = world.store.items()
        answer(world.store, first, answer="ranking", ranks=(1, 2))
        answer(world.store, second, answer="skip", reason="unclear")
        while told[-1]["done"] < 2:
            time.sleep(0.01)
        answer(world.store, third, answer="ranking", ranks=(2, 1))

    thread = threading.Thread(target=people)
    thread.start()
    found = labels.collect(waiting)
    thread.join()
    assert "/join/" in capsys.readouterr().out
    assert (told[0]["items"], told[0]["done"]) == (3, 0)
    assert (found["by"], found["items"], found["labels"]) == ("people", 3, 2)
    assert labels.collect(waiting) == found  # nothing is left to wait for: no page is served
    assert capsys.readouterr().out == ""


def test_a_gate_that_fails_says_by_how_much_and_how_to_ask_for_more(world: World) -> None:
    label = {"by": "simulated", "annotate": f"{world.annotate}:longer"}
    settings = config(label, choice={"count": 5}, quality={"min_labels": 8})
    work = Work(settings, Run(world.folder), Reporter(quiet=True))
    assert work.do("label", world.at(), silent).detail["labels"] == 5
    with pytest.raises(AccordError) as told:
        work.do("gate", world.at(), silent)
    assert "labels is 5, but must be at least 8 (quality.min_labels)" in str(told.value)
    assert f"accord resume {world.folder} choice.count=NUMBER" in str(told.value)
    assert not (world.folder / "round-1" / "labels").exists()
    more = Work(
        config(label, choice={"count": 8}, quality={"min_labels": 8}),
        Run(world.folder),
        Reporter(quiet=True),
    )
    assert more.do("label", world.at(), silent).detail["labels"] == 8
    assert more.do("gate", world.at(), silent).detail["train.parquet"] == 8


def test_rewards_to_choose_by_are_those_of_the_round_before(world: World) -> None:
    settings = config(
        {"by": "people"}, dpo=None, reward_model={}, choice={"strategy": "uncertainty"},
        train={"data": {"prompts": "p.jsonl"}},
    )  # fmt: skip
    assert choice_of_round(settings, world.at(1)).strategy == "random"
    asked = choice_of_round(settings, world.at(2))
    assert asked.strategy == "uncertainty"
    assert str(asked.reward_model).endswith("r/round-1/reward_model/reward_model")
