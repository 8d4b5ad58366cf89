"""The gradient of one update against the loss written out with a plain model and autograd."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cluster.contracts.metrics import values
from learner.rl.experience import (
    Experience,
    MeasuredByUpdate,
    Proximal,
    StepPlan,
    build_experience,
)
from learner.rl.networks import build_networks, build_optimizers
from learner.rl.rollouts import read_batch
from learner.rl.update import PolicyUpdate

COEF = 0.3
CAP = 1.1
PLAN = StepPlan(step=1, kl_coef=COEF)


def _stale(world: ModuleType, tiny: Path, **settings: Any) -> tuple[Experience, Any, Any]:
    """Experience whose behaviour, proximal and reference policies are three different ones."""
    made = world.make_settings(tiny, staleness={"cap": CAP}, **settings)
    networks, _ = build_networks(made)
    engine = AutoModelForCausalLM.from_pretrained(tiny).eval()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for size, model in ((0.05, networks.policy), (0.03, networks.reference)):
            for p in model.parameters():
                p.add_(size * torch.randn(p.shape, generator=generator))
    batch = read_batch([world.table_of(world.make_groups(engine, seed=2))], [0, 1, 2, 3], 2)
    return build_experience(batch, networks, made, PLAN), networks, made


def _rows(policy: Any, experience: Experience) -> list[tuple[Tensor, Tensor]]:
    """(log-probabilities, entropies) of each answer, with gradient, one row at a time."""
    found = []
    for i in range(len(experience)):
        prompt = experience.batch.prompt_ids.row(i).tolist()
        answer = experience.batch.response_ids.row(i).tolist()
        logits = policy(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        every = logits.log_softmax(-1)
        chosen = every.gather(-1, torch.tensor(answer)[:, None]).squeeze(-1)
        found.append((chosen, -(every.exp() * every).sum(-1)))
    return found


def _loss(
    policy: Any,
    experience: Experience,
    proximal: Proximal,
    *,
    kl_in_loss: bool,
    entropy_coef: float,
    per_answer: bool,
) -> Tensor:
    rows, total = _rows(policy, experience), torch.zeros(())
    tokens = sum(len(logp) for logp, _ in rows)
    assert experience.ref_logp is not None
    for i, (logp, entropy) in enumerate(rows):
        n = len(logp)
        prox, mu = proximal.logp[i, :n], experience.behaviour_logp[i, :n]
        advantage = experience.advantages[i, :n]
        ratio = (logp - prox).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        token = -(prox - mu).exp().clamp(max=CAP) * surrogate - entropy_coef * entropy
        if kl_in_loss:
            to_reference = 0.5 * (logp - experience.ref_logp[i, :n]).square()
            token = token + COEF * (logp.detach() - mu).exp().clamp(max=CAP) * to_reference
        total = total + (token.sum() / n / len(rows) if per_answer else token.sum() / tokens)
    return total


@pytest.mark.parametrize("per_answer", [False, True])
@pytest.mark.parametrize("kl_in_loss", [False, True])
def test_gradient_of_an_update_on_stale_samples(
    world: ModuleType, tiny: Path, kl_in_loss: bool, per_answer: bool
) -> None:
    kl = {"place": "loss", "estimator": "k2"} if kl_in_loss else {}
    algorithm = {
        "advantage": "rloo",
        "entropy_coef": 0.05,
        "kl": kl,
        "aggregate": "seq-mean-token-mean" if per_answer else "token-mean",
    }
    # An eps that does not turn the rounding of tiny gradients into whole steps.
    learner = {"eps": 1e-5}
    experience, networks, made = _stale(world, tiny, algorithm=algorithm, learner=learner)
    plain = copy.deepcopy(networks.policy)
    optimizers = build_optimizers(networks, made.learner)
    result = PolicyUpdate(networks, optimizers, made).train(experience, PLAN)
    metrics, proximal = values(result.metrics), result.proximal
    assert isinstance(experience.proximal, MeasuredByUpdate) == kl_in_loss
    assert float((proximal.importance == CAP).float().mean()) > 0.05, "the cap must bite"
    _loss(
        plain,
        experience,
        proximal,
        kl_in_loss=kl_in_loss,
        entropy_coef=0.05,
        per_answer=per_answer,
    ).backward()
    grads = torch.cat([p.grad.flatten() for p in plain.parameters()])
    assert metrics["policy/grad_norm"] == pytest.approx(float(grads.norm()), rel=1e-4)
    # Adam's first step is lr * g / (|g| + eps): the sign of every gradient that is not tiny.
    clipped = grads * min(1.0, 1.0 / float(grads.norm()))
    step = torch.cat(
        [
            (q - p).flatten()
            for p, q in zip(plain.parameters(), networks.policy.parameters(), strict=True)
        ]
    )
    expected = -made.learner.lr * clipped / (clipped.abs() + made.learner.eps)
    torch.testing.assert_close(step, expected, rtol=1e-2, atol=2e-5)


def test_minibatches_cover_every_sample_once_and_differ_by_epoch_and_step(
    world: ModuleType, tiny: Path
) -> None:
    made = {"epochs": 2, "minibatches": 3}
    experience, networks, settings = _stale(
        world, tiny, learner=made, algorithm={"advantage": "rloo"}
    )
    update = PolicyUpdate(networks, build_optimizers(networks, settings.learner), settings)
    orders = []
    for step in (0, 1):
        parts = list(update._minibatches(experience, step))
        for epoch in (parts[:3], parts[3:]):
            assert sorted(row for part in epoch for row in part.rows) == list(range(8))
            assert sorted(len(part.rows) for part in epoch) == [2, 3, 3]
            assert sum(part.tokens for part in epoch) == int(experience.mask.sum())
            orders.append([part.rows for part in epoch])
    assert all(orders[0] != other for other in orders[1:])


def test_dr_grpos_constant_divides_the_sum_by_the_token_limit(
    world: ModuleType, tiny: Path
) -> None:
    """`max_tokens` of the world is 8: the first gradient is an eighth of that of the sums."""
    norms = []
    for aggregate in ("seq-mean-token-sum", "seq-mean-token-sum-norm"):
        algorithm = {"advantage": "rloo", "aggregate": aggregate, "kl": {"coef": 0.0}}
        made = world.make_settings(tiny, algorithm=algorithm)
        networks, _ = build_networks(made)
        engine = AutoModelForCausalLM.from_pretrained(tiny).eval()
        batch = read_batch([world.table_of(world.make_groups(engine, seed=2))], [0, 1, 2, 3], 2)
        plan = StepPlan(step=0, kl_coef=0.0)
        experience = build_experience(batch, networks, made, plan)
        optimizers = build_optimizers(networks, made.learner)
        result = PolicyUpdate(networks, optimizers, made).train(experience, plan)
        norms.append(values(result.metrics)["policy/grad_norm"])
    assert norms[0] > 1e-3
    assert norms[1] == pytest.approx(norms[0] / 8, rel=1e-4)
