"""What a run's roles cost is found by the next run of the same config here, and by no other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cluster.assembly.core_record import costs_key, known_costs, write_costs
from cluster.contracts.config.train import TrainConfig
from cluster.machine.placement import StepCosts

COSTS = {"workers": 1.0, "learner": 1.2, "reward": 0.04, "controller": 0.02, "ray": 0.05}
DETAIL = {"step": 64, "step_s": 1.25, "cores": [], "cpu_s": COSTS, "why": "because"}


def config(folder: Path, name: str = "now", **sections: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {"prompts": "p.jsonl"},
            "reward": {"sources": [{"type": "rules", "max_words": 5}]},
            "run": {"dir": str(folder), "name": name},
            **sections,
        }
    )


def run_of(given: TrainConfig, name: str, cores: int = 2) -> Path:
    run = Path(given.run.dir) / name
    run.mkdir()
    write_costs(run, costs_key(given, range(cores)), DETAIL)
    return run


def test_the_next_run_of_the_same_config_knows_the_costs(tmp_path: Path) -> None:
    run = run_of(config(tmp_path, "before", batch={"steps": 10}), "before")
    again = config(tmp_path, "again", batch={"steps": 99}, logging={"samples_every": 7})
    found = known_costs(again, range(2))
    assert (found.costs, found.step_s) == (StepCosts(**COSTS), 1.25)
    assert found.source == f"measured by {run}"


def test_a_record_of_something_else_is_ignored_and_that_is_said(tmp_path: Path) -> None:
    given = config(tmp_path)
    nothing = f"no run in {tmp_path} has measured this config here"
    assert known_costs(given, range(2)).source == nothing
    run_of(given, "four-cores", cores=4)
    run_of(config(tmp_path, rollout={"max_tokens": 9}), "longer")
    (run_of(given, "broken") / "cores.json").write_text('{"key":')
    found = known_costs(given, range(2))
    assert found.costs is None
    assert found.source == f"{nothing}; 3 have measured other settings or another machine"


def test_the_newest_counts(tmp_path: Path) -> None:
    given = config(tmp_path)
    old, new = run_of(given, "b-old"), run_of(given, "a-new")
    os.utime(old / "cores.json", (1, 1))
    assert known_costs(given, range(2)).source == f"measured by {new}"
