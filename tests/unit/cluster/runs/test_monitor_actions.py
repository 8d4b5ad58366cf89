"""What a monitor's alarm does to a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.contracts.config.monitors import Action, MonitorsConfig
from cluster.runs.control import read_wishes
from cluster.runs.monitor_actions import MonitorActions
from cluster.runs.monitors import AlarmChange


def alarm(action: Action, *, step: int = 30, since: int = 22, name: str = "a") -> AlarmChange:
    return AlarmChange(name, "start", step, 1.0, 0.5, "It is bad.", action, since)


def actions(folder: Path, **given: Any) -> MonitorActions:
    state = {key: given.pop(key) for key in ("rollbacks", "coefficient") if key in given}
    for step in (10, 20, 30):
        place = folder / "checkpoints" / f"step-{step:06d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / "manifest.json").touch()
    return MonitorActions(MonitorsConfig(**given), folder, steps=100, **state)


def best(folder: Path, step: int) -> None:
    row = {"step": step, "checkpoint": f"checkpoints/step-{step:06d}", "score": 0.9}
    (folder / "best.json").write_text(json.dumps(row))


@pytest.mark.parametrize(
    ("before", "after"), [(0.0, 0.02), (0.005, 0.02), (0.05, 0.1), (0.7, 1.0), (1.0, None)]
)
def test_the_kl_coefficient_is_raised_up_to_a_bound(
    tmp_path: Path, before: float, after: float | None
) -> None:
    made = actions(tmp_path)
    made.act([alarm("raise_kl")], {"objective/kl_coef": before})
    assert made.kl_coef == after
    made.next_step_trained()
    assert made.kl_coef is None


def test_a_coefficient_over_the_bound_stays() -> None:
    assert MonitorsConfig(kl_most=0.1).raised_kl(0.5) == 0.5


def test_a_pause_and_a_stop_are_asked_for_as_a_person_asks(tmp_path: Path) -> None:
    made = actions(tmp_path)
    told = made.act([alarm("pause")], {})
    assert read_wishes(tmp_path).paused
    assert "accord resume" in told["a"]
    made.act([alarm("stop")], {})
    assert read_wishes(tmp_path).stop


def test_a_stop_leaves_the_policy_of_before_the_cause_or_the_best(tmp_path: Path) -> None:
    made = actions(tmp_path)
    made.act([alarm("stop", since=22)], {})
    assert made.result == tmp_path / "checkpoints" / "step-000020"
    best(tmp_path, 10)
    told = made.act([alarm("stop", since=22)], {})
    assert made.result == tmp_path / "checkpoints" / "step-000010"
    assert told == {"a": "The run stops; policy/ is that of step-000010."}
    best(tmp_path, 15)  # which is not there
    made.act([alarm("stop", since=22)], {})
    assert made.result == tmp_path / "checkpoints" / "step-000020"


def test_a_rollback_goes_to_the_best_with_a_higher_coefficient(tmp_path: Path) -> None:
    made = actions(tmp_path, coefficient=0.05)
    best(tmp_path, 20)
    made.act([alarm("rollback")], {})
    assert made.go_back is not None
    assert (made.go_back.checkpoint.name, made.go_back.kl_coef) == ("step-000020", 0.1)
    made.gone_back(0.1)
    assert made.go_back is None
    assert (made.rollbacks, made.coefficient) == (1, 0.1)
    made.act([alarm("rollback", step=60, since=55)], {})
    assert made.go_back is not None
    assert made.go_back.kl_coef == 0.2  # to the same checkpoint, but not in the same way


@pytest.mark.parametrize(
    ("rollbacks", "since", "step", "why"),
    [
        (2, 22, 30, "It has gone back 2 times already."),
        (0, 5, 30, "There is no checkpoint to go back to."),
        (0, 22, 100, "All steps are done."),
    ],
)
def test_where_it_cannot_go_back_the_run_stops(
    tmp_path: Path, rollbacks: int, since: int, step: int, why: str
) -> None:
    made = actions(tmp_path, rollbacks=rollbacks)
    told = made.act([alarm("rollback", since=since, step=step)], {})
    assert made.go_back is None
    assert read_wishes(tmp_path).stop
    assert told["a"].startswith(why)


def test_of_several_actions_the_strongest_is_taken(tmp_path: Path) -> None:
    made = actions(tmp_path)
    wanted = [alarm("raise_kl", name="k"), alarm("stop", name="s"), alarm("rollback", name="r")]
    told = made.act([*wanted, alarm("warn", name="w")], {"objective/kl_coef": 0.1})
    assert list(told) == ["s"]
    assert (made.kl_coef, made.go_back) == (None, None)


def test_the_start_line_names_those_that_act() -> None:
    acts = {"kl_budget": "raise_kl", "held_out_gap": "rollback"}
    config = MonitorsConfig.model_validate({"actions": acts})
    line = "monitors that act: held-out-gap (rollback), kl-budget (raise_kl)"
    assert config.acting_line() == line
    assert config.moves_kl
    assert MonitorsConfig().acting_line() == ""
    off = MonitorsConfig.model_validate({"enabled": False, "actions": acts})
    assert (off.acting_line(), off.moves_kl) == ("", False)
