"""Algorithm settings that do not belong together: each refused with one line that names the fix."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.contracts.config.file import check_config
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import UserError

GROUPED = {"advantage": "grpo", "aggregate": "seq-mean-token-mean"}


def check(algorithm: dict[str, Any], **sections: Any) -> TrainConfig:
    tree = {
        "model": {"path": "m"},
        "data": {"prompts": "p.jsonl"},
        "reward": {"sources": [{"type": "rules"}]},
        "algorithm": algorithm,
        **sections,
    }
    return check_config(TrainConfig, tree, where="test")


@pytest.mark.parametrize(
    ("algorithm", "says"),
    [
        (
            {"loss": "gspo", "advantage": "grpo"},
            r"aggregate = 'token-mean' would weight .* 'seq-mean-token-mean'",
        ),
        ({**GROUPED, "loss": "gspo", "aggregate": "seq-mean-token-sum"}, "by their length"),
        ({**GROUPED, "loss": "gspo", "advantage": "gae"}, r"its own advantage: .* = 'grpo'"),
        ({**GROUPED, "loss": "gspo", "advantage": "reinforce++"}, "its own advantage"),
        ({"loss": "reinforce", "clip_low": 0.1}, "clip_low does nothing .* to 'ppo', 'cispo'"),
        ({"loss": "cispo", "dual_clip": 3}, r"belongs to 'ppo'\): remove it"),
        ({**GROUPED, "whiten_rewards": True}, "whiten_rewards scales rewards that 'grpo'"),
        ({"advantage": "rloo", "truncated": "bootstrap"}, "needs values"),
        ({"loss": "pppo"}, "did you mean 'ppo'. known: ppo, reinforce, cispo, gspo"),
    ],
)
def test_what_does_not_belong_together_is_refused(algorithm: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check(algorithm)


def test_what_belongs_together_is_taken() -> None:
    check({**GROUPED, "loss": "gspo"})
    check({**GROUPED, "loss": "gspo", "advantage": "rloo"})
    check({"aggregate": "seq-mean-token-sum-norm", "scale_by_std": False, "advantage": "grpo"})
    staleness = {"correction": "token-mask", "cap": 2.0, "floor": 0.5, "veto": 1e-4}
    assert check({}, staleness=staleness).staleness.floor == 0.5


def test_a_floor_without_a_correction_is_refused() -> None:
    with pytest.raises(UserError, match=r"floor does nothing with staleness\.correction = 'none'"):
        check({}, staleness={"correction": "none", "floor": 0.5})
