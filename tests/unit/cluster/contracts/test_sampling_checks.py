"""Limits on sampling: what training refuses because the learner could not match it."""

from __future__ import annotations

import pytest

from cluster.contracts.config.file import load_config
from cluster.contracts.config.rollout import RolloutConfig
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import UserError

BASE = ["model.path=m", "data.prompts=p.jsonl", 'reward.sources=[{type="model",path="rm"}]']


def train(*overrides: str) -> TrainConfig:
    return load_config(TrainConfig, None, [*BASE, *overrides])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.top_p=0.9"], "rollout.top_p needs rollout.top_k in training"),
        (["rollout.min_p=0.05"], "rollout.min_p needs rollout.top_k in training"),
        (["rollout.top_k=5000"], "rollout.top_k = 5000 is over 4096"),
        (
            ["rollout.banned_tokens=[3]", "rollout.tensor_parallel=2"],
            "cannot be recorded with rollout.tensor_parallel over 1",
        ),
        (["rollout.quantization=int8", "rollout.engine=transformers"], "needs vLLM"),
        (["rollout.quantization=int8", "staleness.correction=none"], "another policy"),
        (["rollout.top_k=20", "rollout.temperature=1e-6"], "as good as none"),
        (['rollout.stop=[""]'], "empty string"),
        (["rollout.top_p=0"], "top_p"),
        (["rollout.min_p=1"], "min_p"),
    ],
)
def test_training_refuses_what_it_cannot_match(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        train(*overrides)
    assert words in str(caught.value)


def test_training_takes_what_it_can_match() -> None:
    rollout = train(
        "rollout.top_k=1024", "rollout.top_p=0.9", "rollout.min_p=0.01", "rollout.min_tokens=3",
        "rollout.allowed_tokens=[1,5]", "rollout.banned_tokens=[7]", 'rollout.stop=["\\n\\n"]',
    ).rollout  # fmt: skip
    assert rollout.limits_tokens
    assert rollout.stop == ("\n\n",)
    assert not RolloutConfig().limits_tokens


def test_generate_and_evaluate_take_more() -> None:
    """Nobody learns from these, so nothing has to be recorded."""
    assert RolloutConfig(top_p=0.9, tensor_parallel=2).limits_tokens
