"""What `accord plan` says about who runs on which core."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.assembly.core_record import KnownCosts
from cluster.contracts.config.train import TrainConfig
from cluster.machine.cores import plan_cores
from cluster.machine.placement import StepCosts
from cluster.measure.core_outlook import core_lines, core_outlook, probed_costs

COSTS = StepCosts(workers=1.0, learner=1.2, reward=0.04, controller=0.02, ray=0.05)
TWO = plan_cores(range(2), 1, pin=True)


def config(**sections: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {"prompts": "p.jsonl"},
            "reward": {"sources": [{"type": "rules"}]},
            "batch": {"prompts_per_step": 10, "samples_per_prompt": 4},
            **sections,
        }
    )


def test_the_table_has_a_row_for_each_place_and_the_reason() -> None:
    text = core_lines(core_outlook(config(), TWO, COSTS, "measured by runs/a", 1.25))
    assert text == [
        "  cores          CPU s per step   busy   who runs there",
        "  core 0                  1.110    89%   1 rollout worker, reward service, controller, "
        "Ray",
        "  core 1                  1.200    96%   learner",
        "  CPU seconds per step: workers 1.000, learner 1.200, reward service 0.040, controller "
        "0.020, Ray 0.050",
        "  costs: measured by runs/a",
        "  why: the busiest core has 1.200 CPU seconds per step instead of 1.275 (-6%)",
    ]


def test_without_costs_it_is_told_where_a_run_starts() -> None:
    text = "\n".join(core_lines(core_outlook(config(), TWO, None, "not known: --probe measures")))
    assert "learner, reward service" in text
    assert [line.split()[:3] for line in text.splitlines()][3] == ["any", "core", "controller,"]
    assert "costs: not known: --probe measures" in text
    assert "CPU seconds per step:" not in text


@pytest.mark.parametrize(
    ("given", "cores", "why"),
    [
        (config(), plan_cores(range(4), 1, pin=False), "no role has cores of its own"),
        (config(staleness={"bound": 0}), TWO, "take turns"),
    ],
    ids=["not pinned", "synchronous"],
)
def test_nothing_is_dealt_out_where_that_would_not_help(given: Any, cores: Any, why: str) -> None:
    found = core_outlook(given, cores, COSTS, "measured by runs/a", 1.0)
    assert why in found.why
    assert found.placement is None
    assert found.beside() == {"workers": 0.0, "learner": 0.0}
    assert found.rows[-1].roles[-2:] == ["controller", "Ray"]


def test_cores_that_are_left_over_are_named() -> None:
    found = core_outlook(config(), plan_cores(range(6), 1, pin=True), COSTS, "measured", 1.25)
    assert core_lines(found)[-1] == "  3 cores idle: learner.cpus=4 would use them"


MEASURED = {
    "engine": {"mean_length": 50.0, "tokens_per_s": 1000.0, "cpu_share": 0.9},
    "reward": {"scoring_cpu_s": 0.04},
    "learner": {"learn_cpu_s": 1.2},
}


def test_a_probe_measures_three_roles_and_takes_the_others_from_a_run_or_an_estimate() -> None:
    costs, source = probed_costs(config(), MEASURED, KnownCosts(COSTS, "measured by runs/a"))
    assert costs == StepCosts(workers=1.8, learner=1.2, reward=0.04, controller=0.02, ray=0.05)
    assert source == "measured by this probe; the controller's and Ray's measured by runs/a"
    costs, source = probed_costs(config(), MEASURED, KnownCosts(None, "no run"))
    assert (costs.controller, costs.ray) == pytest.approx((0.040, 0.049))  # of ten groups
    assert "estimated" in source
