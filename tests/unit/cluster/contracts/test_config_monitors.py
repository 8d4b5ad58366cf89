"""`[monitors]` together with the other sections."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.contracts.config.file import check_config
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import UserError


def train(**sections: Any) -> TrainConfig:
    tree = {
        "model": {"path": "m"},
        "data": {"prompts": "p.jsonl"},
        "reward": {"sources": [{"type": "rules", "name": "rules"}]},
        **sections,
    }
    return check_config(TrainConfig, tree, where="c.toml")


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        (
            {"monitors": {"second_judge": "gold"}},
            r"monitors\.second_judge = 'gold' is none of reward\.sources \(rules\)",
        ),
        ({"monitors": {"kl_least": 0.5, "kl_most": 0.1}}, "kl_least is over kl_most"),
        ({"monitors": {"actions": {"kl_budget": "explode"}}}, "monitors.actions.kl_budget"),
        ({"monitors": {"actions": {"kl_bugdet": "stop"}}}, "kl_budget"),
        (
            {
                "monitors": {"actions": {"kl_budget": "raise_kl"}},
                "algorithm": {"kl": {"coef": 0.0, "place": "loss"}},
            },
            "'k1' has no useful gradient in the loss",
        ),
    ],
)
def test_what_cannot_be_is_said_before_the_run(sections: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        train(**sections)


def test_the_section_has_its_old_name_in_runs_of_before() -> None:
    assert train(alarms={"patience": 7}).monitors.patience == 7
    both = train(alarms={"patience": 7}, monitors={"actions": {"kl_budget": "stop"}}).monitors
    assert (both.patience, both.acting) == (7, {"kl-budget": "stop"})
    with pytest.raises(UserError, match="monitors = 3"):
        train(alarms={"patience": 7}, monitors=3)


def test_without_monitors_that_act_no_reference_is_kept_for_them() -> None:
    assert not train().monitors.moves_kl
    assert train(monitors={"actions": {"refusals": "rollback"}}).monitors.moves_kl
