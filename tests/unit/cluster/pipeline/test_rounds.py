"""The loop over the stages: their order, and that an end at any place loses and doubles nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.contracts.config.file import check_config
from cluster.contracts.config.pipeline import PipelineConfig
from cluster.contracts.errors import UserError
from cluster.pipeline.record import FILE, PipelineRecord, StageName
from cluster.pipeline.rounds import (
    Outcome,
    Round,
    Waiting,
    go_round,
    newest_promoted,
    steps_of,
)


def config(**more: Any) -> PipelineConfig:
    tree = {
        "rounds": 2,
        "model": {"path": "m"},
        "sft": {"data": {"path": "d.jsonl"}},
        "sample": {"data": {"prompts": "p.jsonl"}},
        "label": {"by": "people"},
        "dpo": {},
        "evaluate": {
            "data": {"prompts": "p.jsonl"},
            "judge": {"sources": [{"type": "rules", "max_words": 9}]},
        },
        **more,
    }
    return check_config(PipelineConfig, tree, where="test")


class Killed(BaseException):
    """As a process that is gone: nothing after it runs."""


class FakeStages:
    """Each stage writes a file that says which policy it began with; labels are counted in
    ``labels.txt``. ``die`` is asked at three places of each stage."""

    def __init__(
        self, folder: Path, die: Callable[[str], None], promote: Callable[[int], bool]
    ) -> None:
        self.folder = folder
        self.die = die
        self.promote = promote
        self.done: list[tuple[int, str]] = []

    def do(self, name: StageName, at: Round, waiting: Waiting) -> Outcome:
        where = f"{at.number}/{name}"
        self.die(f"before {where}")
        self.done.append((at.number, name))
        target = at.path("policy" if name == "policy" else name)
        target.mkdir(parents=True, exist_ok=True)
        (target / "half.txt").write_text("half")
        if name == "label":
            waiting({"done": 1})
            file = self.folder / "labels.txt"
            rows = set(file.read_text().split()) if file.exists() else set()
            file.write_text("\n".join(sorted({*rows, f"label-{at.number}"})))
        self.die(f"within {where}")
        (target / "half.txt").unlink()
        (target / "made.txt").write_text(f"{where} from {at.named(at.before)}")
        self.die(f"after {where}")
        detail: Mapping[str, Any] = {}
        if name == "promote":
            detail = {"promoted": self.promote(at.number), "reason": "as asked"}
        return Outcome(made=(target,), came_from=(at.before,), detail=detail)


def nobody(place: str) -> None:
    """Lets everything live."""


def always(number: int) -> bool:
    return True


def run(folder: Path, die: Callable[[str], None] = nobody, **keys: Any) -> FakeStages:
    settings = keys.get("config") or config()
    stages = FakeStages(folder, die, keys.get("promote", always))
    go_round(settings, PipelineRecord(folder, settings.rounds), stages)
    return stages


def files_of(folder: Path) -> dict[str, str]:
    found = {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.txt")}
    rows = json.loads((folder / FILE).read_text())
    for row in rows["stages"]:
        row.pop("seconds")
    return {**found, FILE: json.dumps(rows)}


def test_the_order_follows_from_the_config() -> None:
    one = ["sample", "label", "gate", "policy", "evaluate", "promote"]
    expected = [(0, "sft"), *((n, name) for n in (1, 2) for name in one)]
    assert list(steps_of(config())) == expected
    plain = config(sft=None, evaluate=None, rounds=1)
    assert [name for _, name in steps_of(plain)] == ["sample", "label", "gate", "policy", "promote"]
    ppo = config(
        rounds=1, dpo=None, reward_model={}, train={"data": {"prompts": "p.jsonl"}}, sft=None
    )
    assert [name for _, name in steps_of(ppo)][3:5] == ["reward_model", "policy"]


def test_a_round_goes_on_from_the_last_promoted_policy(tmp_path: Path) -> None:
    run(tmp_path, config=config(rounds=4), promote=lambda number: number in (1, 3))
    before = {
        row["round"]: row["parents"][0]
        for row in json.loads((tmp_path / FILE).read_text())["stages"]
        if row["name"] == "policy"
    }
    assert before == {
        1: "sft/policy",
        2: "round-1/policy/policy",
        3: "round-1/policy/policy",
        4: "round-3/policy/policy",
    }
    newest = newest_promoted(PipelineRecord(tmp_path, 4))
    assert newest == tmp_path / "round-3" / "policy" / "policy"


PLACES = [
    f"{when} {number}/{name}" for number, name in steps_of(config())
    for when in ("before", "within", "after")
]  # fmt: skip


def test_an_end_at_any_place_changes_nothing_of_what_comes_out(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    run(whole)
    for place in PLACES:
        folder = tmp_path / place.replace("/", "-")
        folder.mkdir()

        def die(now: str, place: str = place) -> None:
            if now == place:
                raise Killed

        with pytest.raises(Killed):
            run(folder, die)
        left = json.loads((folder / FILE).read_text())["stages"]
        assert [row["status"] for row in left if row["status"] != "finished"] in (
            ["running"], ["waiting"]
        )  # fmt: skip
        again = run(folder)
        name = "label" if left[-1]["name"] == "gate" else left[-1]["name"]
        assert again.done[0] == (left[-1]["round"], name)
        assert files_of(folder) == files_of(whole)


def test_nothing_is_done_twice(tmp_path: Path) -> None:
    assert len(run(tmp_path).done) == 13
    assert run(tmp_path).done == []
    more = run(tmp_path, config=config(rounds=3))
    assert {number for number, _ in more.done} == {3}


def test_what_a_finished_stage_made_must_be_as_it_was(tmp_path: Path) -> None:
    run(tmp_path)
    made = tmp_path / "round-1" / "policy" / "made.txt"
    before = made.read_text()
    made.write_text("another")
    with pytest.raises(UserError, match="has changed since round 1, policy made it") as told:
        run(tmp_path)
    assert told.value.where.endswith("round-1/policy")
    made.unlink()
    made.parent.rmdir()
    with pytest.raises(UserError, match="is gone; round 1, policy made it"):
        run(tmp_path)
    made.parent.mkdir()
    made.write_text(before)
    assert run(tmp_path).done == []


def test_a_failure_is_written_down_with_its_cause_and_tried_again(tmp_path: Path) -> None:
    def fail(place: str) -> None:
        if place == "within 1/gate":
            raise UserError("alpha is 0.1", where="store", fix="label more")

    with pytest.raises(UserError, match="alpha"):
        run(tmp_path, fail)
    last = json.loads((tmp_path / FILE).read_text())["stages"][-1]
    assert (last["name"], last["status"], last["detail"]) == (
        "gate", "failed", {"cause": "alpha is 0.1"}
    )  # fmt: skip
    assert run(tmp_path).done[:2] == [(1, "label"), (1, "gate")]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stages": [{"round": 1}]}', '{"stages": 3}'])
def test_a_damaged_record_is_one_message(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        PipelineRecord(tmp_path, 1)
