"""The experience of a step against plain float64 arithmetic, and the promises it enforces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.contracts.errors import Fatal
from learner.rl.experience import Experience, Proximal, StepPlan, build_experience
from learner.rl.forward import Networks
from learner.rl.metrics import experience_metrics
from learner.rl.networks import build_networks
from learner.rl.rollouts import read_batch

COEF = 0.3


def _plan(version: int) -> StepPlan:
    return StepPlan(step=version, kl_coef=COEF)


def _proximal(experience: Experience) -> Proximal:
    """That of a step which measures before its update."""
    assert isinstance(experience.proximal, Proximal)
    return experience.proximal


def _networks(world: ModuleType, tiny: Path, **settings: Any) -> tuple[Networks, Any, Any]:
    """Networks whose reference and values are not trivial, the settings, and the engine's model."""
    made = world.make_settings(tiny, **settings)
    networks, _ = build_networks(made)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        if networks.reference is not None:
            for p in networks.reference.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
        if networks.value is not None:
            for p in networks.value.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return networks, made, AutoModelForCausalLM.from_pretrained(tiny).eval()


def _experience(
    world: ModuleType, tiny: Path, *, version: int = 0, made_at: int = 0, **settings: Any
) -> tuple[Experience, Networks, Any]:
    networks, made, model = _networks(world, tiny, **settings)
    groups = world.make_groups(model, seed=2, version=made_at)
    batch = read_batch([world.table_of(groups)], [0, 1, 2, 3], 2)
    return build_experience(batch, networks, made, _plan(version)), networks, made


@torch.no_grad()
def _logp(model: Any, prompt: np.ndarray[Any, Any], answer: np.ndarray[Any, Any]) -> Any:
    ids = torch.tensor([[*prompt, *answer]], dtype=torch.int64)
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).squeeze(-1).numpy()


@torch.no_grad()
def _state_values(networks: Networks, prompt: Any, answer: Any) -> tuple[Any, float]:
    """(V before each answer token, V after the last), one row, from the head's weights."""
    assert networks.value is not None
    ids = torch.tensor([[*prompt, *answer]], dtype=torch.int64)
    hidden = networks.policy(input_ids=ids, output_hidden_states=True).hidden_states[-1][0].double()
    head = networks.value.linear
    every = (hidden @ head.weight[0].double() + head.bias.double()).numpy()
    return every[len(prompt) - 1 : -1], float(every[-1])


def _rows(experience: Experience) -> list[tuple[Any, Any]]:
    batch = experience.batch
    return [(batch.prompt_ids.row(i), batch.response_ids.row(i)) for i in range(len(batch))]


def _padded(rows: Sequence[Any], width: int) -> Any:
    return np.stack([np.pad(row, (0, width - len(row))) for row in rows])


def _whitened(rows: Sequence[Any]) -> list[Any]:
    flat = np.concatenate(rows)
    return [(row - flat.mean()) / np.sqrt(flat.var(ddof=1) + 1e-8) for row in rows]


def _gae(rewards: Any, values: Any, bootstrap: float, gamma: float, lam: float) -> Any:
    out = np.zeros(len(rewards))
    ahead, after = 0.0, bootstrap
    for t in range(len(rewards) - 1, -1, -1):
        ahead = rewards[t] + gamma * after - values[t] + gamma * lam * ahead
        after = values[t]
        out[t] = ahead
    return out


@pytest.mark.parametrize("truncated", ["keep", "bootstrap"])
def test_gae_rewards_advantages_and_returns_by_hand(
    world: ModuleType, tiny: Path, truncated: str
) -> None:
    algorithm = {"gamma": 0.97, "lam": 0.9, "missing_eos_penalty": 0.7, "truncated": truncated}
    experience, networks, _ = _experience(world, tiny, algorithm=algorithm)
    batch = experience.batch
    assert 0 < batch.truncated.sum() < len(batch), "the rollouts must hold both kinds of answers"
    rewards, advantages, returns = [], [], []
    for i, (prompt, answer) in enumerate(_rows(experience)):
        kl = _logp(networks.policy, prompt, answer) - _logp(networks.reference, prompt, answer)
        values, after = _state_values(networks, prompt, answer)
        cut = bool(batch.truncated[i])
        reward = -COEF * kl
        reward[-1] += 0.0 if cut and truncated == "bootstrap" else batch.scores[i]
        reward[-1] -= 0.7 * cut
        rest = after if cut and truncated == "bootstrap" else 0.0
        advantage = _gae(reward, values, rest, 0.97, 0.9)
        rewards.append(reward)
        advantages.append(advantage)
        returns.append(advantage + values)
    width = experience.mask.shape[1]
    assert experience.returns is not None
    for ours, theirs in (
        (experience.rewards, rewards),
        (experience.returns, returns),
        (experience.advantages, _whitened(advantages)),
    ):
        np.testing.assert_allclose(ours.numpy(), _padded(theirs, width), atol=2e-5)


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce++", "reinforce-baseline"])
def test_critic_free_advantages_by_hand(world: ModuleType, tiny: Path, name: str) -> None:
    experience, networks, _ = _experience(world, tiny, algorithm={"advantage": name})
    assert networks.value is None
    assert experience.values is None
    assert experience.returns is None
    rewards = []
    for i, (prompt, answer) in enumerate(_rows(experience)):
        kl = _logp(networks.policy, prompt, answer) - _logp(networks.reference, prompt, answer)
        reward = -COEF * kl
        reward[-1] += experience.batch.scores[i]
        rewards.append(reward)
    totals = np.array([row.sum() for row in rewards]).reshape(-1, 2)
    centred = totals - totals.mean(axis=1, keepdims=True)
    scores = experience.batch.scores.reshape(-1, 2)
    penalties = totals - scores
    standardised = scores - scores.mean(axis=1, keepdims=True)
    standardised /= scores.std(axis=1, ddof=1, keepdims=True) + 1e-6
    per_answer: Mapping[str, Any] = {
        "grpo": standardised + penalties - penalties.mean(axis=1, keepdims=True),
        "rloo": totals - totals[:, ::-1],
        "reinforce-baseline": centred,
    }
    if name == "reinforce++":
        expected = [row[::-1].cumsum()[::-1] for row in rewards]
    else:
        flat = per_answer[name].reshape(-1)
        expected = [np.full(len(row), flat[i]) for i, row in enumerate(rewards)]
    if name.startswith("reinforce"):
        expected = _whitened(expected)
    width = experience.mask.shape[1]
    # The reference differs by much less than the scores: float32 sums, divided by a group's spread.
    np.testing.assert_allclose(experience.advantages.numpy(), _padded(expected, width), atol=1e-4)


def test_a_kl_in_the_loss_leaves_the_rewards_alone(world: ModuleType, tiny: Path) -> None:
    kl = {"place": "loss", "estimator": "k3+"}
    experience, _, _ = _experience(world, tiny, algorithm={"kl": kl})
    ends = experience.batch.response_ids.lengths - 1
    placed = experience.rewards[torch.arange(len(ends)), torch.from_numpy(ends)]
    np.testing.assert_allclose(placed.numpy(), experience.batch.scores, rtol=1e-6)
    assert float(experience.rewards.abs().sum()) == pytest.approx(
        float(np.abs(experience.batch.scores).sum()), rel=1e-6
    )


def test_masked_truncated_answers_leave_the_loss_and_nothing_else(
    world: ModuleType, tiny: Path
) -> None:
    kept, _, _ = _experience(world, tiny)
    masked, _, _ = _experience(world, tiny, algorithm={"truncated": "mask"})
    cut = torch.from_numpy(masked.batch.truncated)
    assert cut.any()
    assert not masked.loss_mask[cut].any()
    assert torch.equal(masked.loss_mask[~cut], masked.mask[~cut])
    assert torch.equal(masked.advantages, kept.advantages)


def test_whitened_rewards_have_unit_variance_and_their_mean(world: ModuleType, tiny: Path) -> None:
    plain, _, _ = _experience(world, tiny)
    scaled, _, _ = _experience(world, tiny, algorithm={"whiten_rewards": True})
    before, after = plain.rewards[plain.mask].double(), scaled.rewards[scaled.mask].double()
    assert float(after.std()) == pytest.approx(1.0, abs=1e-4)
    assert float(after.mean()) == pytest.approx(float(before.mean()), abs=1e-4)


@pytest.mark.parametrize(
    "correction", ["none", "decoupled", "token-tis", "sequence-tis", "token-mask", "sequence-mask"]
)
def test_importance_weights_are_one_on_policy(
    world: ModuleType, tiny: Path, correction: str
) -> None:
    experience, _, _ = _experience(world, tiny, staleness={"correction": correction})
    np.testing.assert_allclose(
        _proximal(experience).importance.numpy(), experience.mask.numpy().astype(float), atol=2e-5
    )


def test_stale_tokens_are_weighted_and_do_not_count_as_engine_mismatch(
    world: ModuleType, tiny: Path
) -> None:
    networks, made, model = _networks(world, tiny)
    with torch.no_grad():
        networks.policy.get_input_embeddings().weight.mul_(3.0)
    stale = world.make_groups(model, seed=2, version=5, groups=3)
    fresh_model = networks.policy
    fresh = world.make_groups(fresh_model, seed=3, version=7, first_group=3, groups=1)
    batch = read_batch([world.table_of(stale), world.table_of(fresh)], [0, 1, 2, 3], 2)
    experience = build_experience(batch, networks, made, _plan(7))
    for i, (prompt, answer) in enumerate(_rows(experience)):
        now = _logp(networks.policy, prompt, answer)
        weight = np.minimum(np.exp(now - batch.behaviour_logp.row(i)), 5.0)
        got = _proximal(experience).importance[i, : len(answer)].numpy()
        np.testing.assert_allclose(got, weight, rtol=2e-4)
    found = {
        m.name: m.value for m in experience_metrics(experience, _proximal(experience), COEF, True)
    }
    tokens = batch.response_ids.lengths
    assert found["async/staleness_max"] == 2
    assert found["async/staleness_mean"] == pytest.approx(2 * tokens[:6].sum() / tokens.sum())
    assert found["sampling/logp_diff_max"] < 2e-5
    assert found["sampling/logp_diff_all_mean"] > 1e-3
    assert found["async/ess"] < 0.999


@pytest.mark.parametrize(
    ("version", "made_at", "says"), [(3, 0, "older than the bound 2"), (0, 1, "future")]
)
def test_tokens_outside_the_bound_stop_the_run(
    world: ModuleType, tiny: Path, version: int, made_at: int, says: str
) -> None:
    with pytest.raises(Fatal, match=says):
        _experience(world, tiny, version=version, made_at=made_at)
    # One step inside the bound is fine.
    _experience(world, tiny, version=2, made_at=0)


def test_values_and_logprobs_do_not_depend_on_the_microbatch(world: ModuleType, tiny: Path) -> None:
    small, _, _ = _experience(world, tiny, learner={"tokens_per_microbatch": 16})
    large, _, _ = _experience(world, tiny, learner={"tokens_per_microbatch": 4096})
    assert small.values is not None
    assert large.values is not None
    for one, other in (
        (_proximal(small).logp, _proximal(large).logp),
        (small.values, large.values),
        (_proximal(small).entropy, _proximal(large).entropy),
        (small.advantages, large.advantages),
    ):
        np.testing.assert_allclose(one.numpy(), other.numpy(), atol=2e-5)


def test_bfloat16_compute_keeps_masters_and_results_in_float32(
    world: ModuleType, tiny: Path
) -> None:
    from cluster.contracts.config.base import ModelConfig

    model = ModelConfig(path=str(tiny), dtype="bfloat16")
    experience, networks, _ = _experience(world, tiny, model=model)
    exact, _, _ = _experience(world, tiny)
    assert all(p.dtype == torch.float32 for p in networks.policy.parameters())
    assert _proximal(experience).logp.dtype == torch.float32
    difference = (_proximal(experience).logp - _proximal(exact).logp).abs().max()
    assert 1e-6 < float(difference) < 0.05


def test_equal_scores_give_grpo_no_advantage_of_the_size_of_a_score(
    world: ModuleType, tiny: Path
) -> None:
    """With the KL in the reward: its differences are small and must stay small, not be divided by
    their own standard deviation."""
    networks, made, model = _networks(
        world, tiny, algorithm={"advantage": "grpo"}, batch={"samples_per_prompt": 8}
    )
    groups = world.make_groups(model, seed=2, groups=1, samples=8, score=lambda _: 1.0)
    batch = read_batch([world.table_of(groups)], [0], 8)
    experience = build_experience(batch, networks, made, StepPlan(step=0, kl_coef=1e-3))
    kl = _proximal(experience).kl
    assert kl is not None
    per_answer = kl.sum(dim=1)
    expected = -1e-3 * (per_answer - per_answer.mean())
    assert float(expected.abs().max()) > 1e-6
    got = experience.advantages[:, 0]
    np.testing.assert_allclose(got.numpy(), expected.numpy(), atol=1e-8, rtol=1e-5)


def test_floor_and_veto_of_the_config_bound_the_importance_weights(
    world: ModuleType, tiny: Path
) -> None:
    two_sided = {"correction": "token-mask", "cap": 1.1, "floor": 0.95, "veto": 0.8}
    networks, made, model = _networks(world, tiny, staleness=two_sided)
    with torch.no_grad():
        networks.policy.get_input_embeddings().weight.mul_(3.0)
    batch = read_batch([world.table_of(world.make_groups(model, seed=2))], [0, 1, 2, 3], 2)
    weights = _proximal(build_experience(batch, networks, made, _plan(0))).importance.numpy()
    left_out = kept = vetoed = 0
    for i, (prompt, answer) in enumerate(_rows(build_experience(batch, networks, made, _plan(0)))):
        rho = np.exp(_logp(networks.policy, prompt, answer) - batch.behaviour_logp.row(i))
        inside = (rho >= 0.95) & (rho <= 1.1) & (rho.min() >= 0.8)
        np.testing.assert_allclose(weights[i, : len(answer)], np.where(inside, rho, 0), rtol=2e-4)
        left_out, kept = left_out + int((~inside).sum()), kept + int(inside.sum())
        vetoed += int(rho.min() < 0.8)
    assert min(left_out, kept, vetoed) > 0
    assert vetoed < len(batch)
