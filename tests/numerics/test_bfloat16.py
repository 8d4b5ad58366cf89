"""A learner step in bfloat16 is that of float32 to the rounding of its products.

The bounds are those of engine and learner (tests/integration/test_logprob_parity.py): a step in
bfloat16 is no further from float32 than an engine may be from its learner.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cluster.contracts.config.base import ModelConfig
from learner.rl.experience import StepPlan, build_experience
from learner.rl.networks import build_networks, build_optimizers
from learner.rl.rollouts import RolloutBatch, read_batch
from learner.rl.update import PolicyUpdate

MEAN, LARGEST, MULTIPLIED = 0.01, 0.1, 1.01  # nats, nats, mean of exp |difference|
COSINE = 0.999
PLAN = StepPlan(step=1, kl_coef=0.1)
VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {"algorithm": {"advantage": "grpo", "kl": {"coef": 0.0}}},
    "ppo, shared value head": {"algorithm": {"advantage": "gae"}},
    "ppo, value model of its own": {
        "algorithm": {"advantage": "gae"},
        "learner": {"value_model": "own"},
    },
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step computed. gradients: of each network, whole and flat."""

    logp: Tensor
    ref_logp: Tensor | None
    gradients: list[Tensor]
    networks: Any
    states: list[Tensor]


@pytest.fixture(scope="module")
def model(world: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the quickstart's width, so that sums have as many terms."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    return Path(world.make_model(folder, hidden=128, layers=4, heads=4, keys=4))


@pytest.fixture(scope="module")
def batch(world: ModuleType, model: Path) -> RolloutBatch:
    engine = AutoModelForCausalLM.from_pretrained(model).eval()
    groups = world.make_groups(engine, groups=8, samples=4, max_tokens=24, seed=5)
    return read_batch([world.table_of(groups)], range(8), 4)


def step_in(
    dtype: str, world: ModuleType, path: Path, batch: RolloutBatch, variant: dict[str, Any]
) -> Step:
    made = world.make_settings(
        path,
        model=ModelConfig.model_validate({"path": str(path), "dtype": dtype}),
        batch={"prompts_per_step": 8, "samples_per_prompt": 4},
        **variant,
    )
    networks, _ = build_networks(made)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():  # away from its start: far from uniform, and from the reference
        for network in (networks.policy, networks.value):
            for p in network.parameters() if network is not None else ():
                p.add_(0.06 * torch.randn(p.shape, generator=generator))
    optimizers = build_optimizers(networks, made.learner)
    gradients: list[Tensor] = []

    def keep(optimizer: Any, *_: Any) -> None:
        parts = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        gradients.append(torch.cat(parts))

    both = [one for one in (optimizers.policy, optimizers.value) if one is not None]
    for one in both:
        one.register_step_pre_hook(keep)
    experience = build_experience(batch, networks, made, PLAN)
    result = PolicyUpdate(networks, optimizers, made).train(experience, PLAN)
    states = [x for one in both for state in one.state.values() for x in state.values()]
    mask = experience.mask
    return Step(
        logp=result.proximal.logp[mask],
        ref_logp=None if experience.ref_logp is None else experience.ref_logp[mask],
        gradients=gradients,
        networks=networks,
        states=states,
    )


def close(exact: Tensor, short: Tensor) -> None:
    apart = (exact - short).abs()
    assert float(apart.mean()) <= MEAN
    assert float(apart.max()) <= LARGEST
    assert float(apart.exp().mean()) <= MULTIPLIED
    assert float(apart.max()) > 1e-5, "was anything computed in bfloat16?"


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_log_probabilities_and_gradients(
    world: ModuleType, model: Path, batch: RolloutBatch, variant: str
) -> None:
    exact, short = (
        step_in(dtype, world, model, batch, VARIANTS[variant]) for dtype in ("float32", "bfloat16")
    )
    close(exact.logp, short.logp)
    if exact.ref_logp is not None and short.ref_logp is not None:
        close(exact.ref_logp, short.ref_logp)
    assert len(exact.gradients) == len(short.gradients) >= 1
    for ours, theirs in zip(exact.gradients, short.gradients, strict=True):
        ours, theirs = ours.double(), theirs.double()
        assert float(torch.cosine_similarity(ours, theirs, dim=0)) >= COSINE
        assert float(theirs.norm() / ours.norm()) == pytest.approx(1.0, abs=0.01)


def test_what_is_kept_between_steps_is_float32(
    world: ModuleType, model: Path, batch: RolloutBatch
) -> None:
    """Weights and moments; a rounded weight would lose every update below a 256th of it."""
    done = step_in("bfloat16", world, model, batch, VARIANTS["ppo, value model of its own"])
    trained = [*done.networks.policy.parameters(), *done.networks.value.parameters()]
    kept = [*trained, *done.states, *done.gradients, done.logp]
    assert {tensor.dtype for tensor in kept} == {torch.float32}
    some = trained[3].detach()
    assert not torch.equal(some, some.bfloat16().float())
