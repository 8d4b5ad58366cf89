"""Which steps a resume may train again from their rollouts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import BaseModel

from cluster.assembly.catch_up import UNKNOWN, forget_since, steps_entered, steps_since
from cluster.assembly.training_record import Training
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.records import RunState
from cluster.runs.run import Run
from learner.rl.step_record import StepRecord, attach, settings_digest
from learner.settings import learner_settings


class NoConfig(BaseModel):
    pass


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], None),  # a run of an older release: as far as its rollouts go
        ([{"start": 0}], 0),
        ([{"start": 0}, {"step": 0}, {"step": 1}], 2),
        ([{"start": 0}, {"step": 0}, {"step": 1}, {"start": 1}], 1),  # rolled back
    ],
)
def test_a_step_that_the_ledger_does_not_know_is_not_taken_as_done(
    tmp_path: Path, rows: list[dict[str, int]], expected: int | None
) -> None:
    run = Run.create(str(tmp_path), "r", "train", NoConfig())
    for row in rows:
        run.account(**row)
    assert steps_entered(run) == expected


CONFIG = TrainConfig.model_validate(
    {
        "model": {"path": "m"},
        "data": {"prompts": "p.jsonl"},
        "reward": {"sources": [{"type": "rules", "max_words": 5}]},
        "batch": {"prompts_per_step": 3, "samples_per_prompt": 2, "steps": 6},
    }
)
SETTINGS = settings_digest(learner_settings(CONFIG, canary_prompt=(0,), run_dir=None))


def rollouts(run: Run, step: int, left_out: tuple[int, ...] = (), **changes: Any) -> Path:
    """A file as the learner leaves it after a step: which groups, and what was trained on them."""
    groups = [g for g in range(3 * step, 3 * step + 3) if g not in left_out for _ in range(2)]
    rows = pa.table({"group_id": groups, "prompt_ids": [[1, 2]] * len(groups)})
    record = {"step": step, "before": f"v{step}", "after": f"v{step + 1}", "total_steps": 6}
    record |= {"threads": 1, "device_sums": False, "settings": SETTINGS, **changes}
    path = run.path / "rollouts" / f"step-{step:06d}.parquet"
    path.parent.mkdir(exist_ok=True)
    pq.write_table(attach(rows, StepRecord(**record)), path)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Its steps 0 to 4 have their rollouts."""
    made = Run.create(str(tmp_path), "r", "train", NoConfig())
    for step in range(5):
        rollouts(made, step)
    return made


def numbers(run: Run, step: int, until: int | None = None) -> list[int]:
    return [one.record.step for one in steps_since(run, CONFIG, step, until).steps]


def test_the_steps_after_the_checkpoint_as_far_as_they_were_entered(run: Run) -> None:
    assert numbers(run, 2) == [2, 3, 4]
    assert numbers(run, 2, until=4) == [2, 3]
    assert numbers(run, 2, until=2) == numbers(run, 5) == []
    files = steps_since(run, CONFIG, 3).files
    assert files == tuple(str(run.path / "rollouts" / f"step-00000{n}.parquet") for n in (3, 4))


def test_it_ends_before_the_first_file_that_does_not_follow(run: Run) -> None:
    rollouts(run, 3, settings="others")
    assert numbers(run, 1) == [1, 2]
    rollouts(run, 3, before="of another history")
    assert numbers(run, 1) == [1, 2]
    assert numbers(run, 3) == [3, 4]  # whether it follows the checkpoint, the learner looks
    (run.path / "rollouts" / "step-000003.parquet").unlink()
    assert numbers(run, 1) == [1, 2]
    assert not (run.path / "events.jsonl").exists()  # nothing is damaged


def test_a_damaged_file_is_told_and_ends_it(run: Run) -> None:
    path = rollouts(run, 3)
    path.write_bytes(path.read_bytes()[:-40])
    assert numbers(run, 1) == [1, 2]
    (event,) = map(json.loads, (run.path / "events.jsonl").read_text().splitlines())
    assert (event["kind"], event["step"]) == ("rollouts_unusable", 3)
    assert "step-000003.parquet" in event["cause"]


def test_the_state_after_these_steps_knows_what_was_left_out(run: Run) -> None:
    rollouts(run, 2, left_out=(7,))
    rollouts(run, 3, left_out=(9, 11))
    known = {"group": 9, "prompt": "p", "cause": "too long"}
    state = RunState(step=2, version=2, next_group=6, prompts_total=9, dropped=(known,))
    state = steps_since(run, CONFIG, 2, until=4).advance(state, 3)
    assert (state.step, state.version, state.next_group) == (4, 4, 12)
    assert [row["group"] for row in state.dropped] == [9, 7, 11]
    assert [row["cause"] for row in state.dropped] == ["too long", UNKNOWN, UNKNOWN]


def test_a_run_without_a_checkpoint_goes_on_from_its_start(run: Run) -> None:
    prepared: Any = SimpleNamespace(config=CONFIG, prompts=range(9))
    nobody: Any = None
    begun = Training(prepared=prepared, session=nobody, cores=nobody)
    assert (begun.state, begun.first_step) == (None, 0)
    state = replace(begun, since=steps_since(run, CONFIG, 0, until=2)).state
    assert state == RunState(step=2, version=2, next_group=6, prompts_total=9)


def test_steps_that_will_be_generated_anew_are_forgotten(run: Run) -> None:
    assert forget_since(run, 3) == 2
    assert numbers(run, 0) == [0, 1, 2]
    assert forget_since(run, 3) == 0
