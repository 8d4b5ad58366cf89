"""What must hold at the first update, where learner, engine and reference are the same policy."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.contracts.metrics import values
from cluster.contracts.records import StepInput
from cluster.weights.manifest import verified
from learner.rl.learner import PPOLearner

VARIANTS: list[dict[str, Any]] = [
    {"algorithm": {"advantage": "gae"}},
    {"algorithm": {"advantage": "gae"}, "learner": {"value_model": "own"}},
    {"algorithm": {"advantage": "grpo"}, "temperature": 0.7},
    {"algorithm": {"advantage": "rloo", "loss": "cispo", "clip_low": 1.0}},
    {"algorithm": {"advantage": "reinforce++", "loss": "gspo"}},
    {"algorithm": {"kl": {"place": "loss", "estimator": "k3+"}}},
    {"staleness": {"correction": "sequence-mask"}},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_identities_of_the_first_update(
    world: ModuleType, tiny: Path, variant: dict[str, Any]
) -> None:
    settings = world.make_settings(tiny, **variant)
    learner = PPOLearner(settings, world.KeepingPublisher())
    learner.start()
    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager").eval()
    groups = world.make_groups(model, seed=1, temperature=settings.temperature)
    table = world.table_of(groups)
    result = learner.step(StepInput(step=0, group_ids=(0, 1, 2, 3), payloads=(table,)))
    got = values(result.metrics)
    assert got["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert got["policy/ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert got["policy/clipfrac"] == 0.0
    assert got["policy/approxkl"] == pytest.approx(0.0, abs=1e-6)
    assert got["objective/kl"] == pytest.approx(0.0, abs=1e-6)
    assert got["sampling/logp_diff_max"] < 2e-5
    assert got["sampling/is_ratio_mean"] == pytest.approx(1.0, abs=2e-5)
    assert got["sampling/is_clipped_frac"] == 0.0
    assert got["async/ess"] == pytest.approx(1.0, abs=1e-6)
    assert got["async/staleness_max"] == 0
    assert got["policy/skipped_updates"] == 0
    assert got["policy/grad_norm"] > 0


def test_a_temperature_the_learner_does_not_know_shows_as_mismatch(
    world: ModuleType, tiny: Path
) -> None:
    learner = PPOLearner(world.make_settings(tiny), world.KeepingPublisher())
    learner.start()
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    # Fresh weights give nearly flat logits, where a temperature has little to change.
    table = world.table_of(world.make_groups(model, seed=1, temperature=0.05))
    got = values(learner.step(StepInput(step=0, group_ids=(0, 1, 2, 3), payloads=(table,))).metrics)
    assert got["sampling/logp_diff_max"] > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_published_weights_and_canary_are_what_a_plain_model_computes(
    world: ModuleType, tiny: Path, dtype: str
) -> None:
    publisher = world.KeepingPublisher()
    learner = PPOLearner(world.make_settings(tiny, rollout_dtype=dtype), publisher)
    manifest = learner.start()
    assert list(verified(manifest, [publisher.arrays]))
    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager").eval()
    # The head is tied: its own name must not travel, an engine would load it twice.
    assert set(publisher.arrays) == {name for name, _ in model.named_parameters()}
    assert "lm_head.weight" not in publisher.arrays
    loaded = {}
    for name, array in publisher.arrays.items():
        tensor = torch.from_numpy(array)
        loaded[name] = (tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor).float()
    model.load_state_dict(loaded, strict=False)
    ids = torch.tensor([manifest.canary.token_ids])
    assert manifest.canary.token_ids[:3] == (4, 5, 6)
    assert ids.shape[1] == 32
    with torch.no_grad():
        logp = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    expected = logp.gather(-1, ids[0, 1:, None]).squeeze(-1).numpy()
    np.testing.assert_allclose(manifest.canary.logprobs, expected, atol=2e-6)
    assert manifest.canary.tolerance is None  # what follows from the noise of the engine


def test_masters_stay_exact_when_weights_are_published_rounded(
    world: ModuleType, tiny: Path
) -> None:
    learner = PPOLearner(
        world.make_settings(tiny, rollout_dtype="bfloat16"), world.KeepingPublisher()
    )
    learner.start()
    exact = AutoModelForCausalLM.from_pretrained(tiny)
    ours = dict(learner.state.networks.policy.named_parameters())
    for name, parameter in exact.named_parameters():
        assert torch.equal(parameter, ours[name]), name
