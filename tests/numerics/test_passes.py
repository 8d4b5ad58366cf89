"""Fewer forward passes, packed rows, mixed precision: the same step by another way."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from cluster.contracts.config.base import ModelConfig
from cluster.contracts.errors import UserError
from cluster.contracts.metrics import values
from learner.compute.optimizer import compute_in
from learner.models.heads import LmHead
from learner.models.packed_attention import is_plain_causal
from learner.rl.experience import Experience, Proximal, StepPlan, build_experience
from learner.rl.forward import policy_outputs
from learner.rl.measuring_pass import plan_passes
from learner.rl.metrics import experience_metrics
from learner.rl.microbatch import Microbatches
from learner.rl.networks import build_networks, build_optimizers
from learner.rl.own_rows import OwnRows
from learner.rl.rollouts import RolloutBatch, read_batch
from learner.rl.update import PolicyUpdate

COEF = 0.3

INLINE: list[dict[str, Any]] = [
    {"algorithm": {"advantage": "grpo", "kl": {"coef": 0.0}}},
    {"algorithm": {"advantage": "rloo", "kl": {"place": "loss", "estimator": "k2"}}},
    {"algorithm": {"advantage": "grpo", "kl": {"place": "loss"}, "truncated": "mask"}},
    *(
        {
            "algorithm": {"advantage": "reinforce++", "kl": {"coef": 0.0}, "entropy_coef": 0.05},
            "staleness": {"correction": correction, "cap": 1.1},
        }
        for correction in ("none", "token-tis", "sequence-tis", "token-mask", "sequence-mask")
    ),
    {
        "algorithm": {"advantage": "rloo", "kl": {"coef": 0.0}},
        "staleness": {"correction": "token-mask", "cap": 1.1, "floor": 0.95, "veto": 0.8},
    },
]
KEPT: list[dict[str, Any]] = [
    {"algorithm": {"advantage": "gae", "entropy_coef": 0.05}},
    {"algorithm": {"advantage": "gae"}, "learner": {"value_model": "own"}},
    {"algorithm": {"advantage": "rloo", "loss": "gspo"}},
    {"algorithm": {"advantage": "gae", "kl": {"place": "loss"}, "truncated": "bootstrap"}},
]


def _world(world: ModuleType, tiny: Path, seed: int = 2, **settings: Any) -> Any:
    """(stale batch, networks away from their start, settings)."""
    given = {"staleness": {"cap": 1.1}, **settings}
    made = world.make_settings(tiny, **given)
    networks, _ = build_networks(made)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for model in (networks.policy, networks.reference, networks.value):
            for p in model.parameters() if model is not None else ():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    engine = AutoModelForCausalLM.from_pretrained(tiny).eval()
    table = world.table_of(world.make_groups(engine, seed=seed))
    return read_batch([table], [0, 1, 2, 3], 2), networks, made


PLAN = StepPlan(step=1, kl_coef=COEF)


def _step(
    batch: RolloutBatch, networks: Any, made: Any
) -> tuple[Experience, Proximal, dict[str, float]]:
    experience = build_experience(batch, networks, made, PLAN)
    update = PolicyUpdate(networks, build_optimizers(networks, made.learner), made)
    result = update.train(experience, PLAN)
    measured = experience_metrics(experience, result.proximal, COEF, True)
    found = values([*result.metrics, *measured])
    numbers = {k: v for k, v in found.items() if not k.startswith("time/")}
    return experience, result.proximal, numbers


def _weights(networks: Any) -> Tensor:
    modules = [m for m in (networks.policy, networks.value) if m is not None]
    return torch.cat([p.detach().flatten() for m in modules for p in m.parameters()])


@pytest.mark.parametrize(
    ("plan", "variant"),
    [("inline", v) for v in INLINE] + [("kept", v) for v in KEPT],
    ids=lambda x: str(x),
)
def test_a_step_with_one_forward_pass_is_the_step_with_two(
    world: ModuleType,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    plan: str,
    variant: dict[str, Any],
) -> None:
    batch, networks, made = _world(world, tiny, **variant)
    twin = copy.deepcopy(networks)
    assert plan_passes(made, networks, value_only=False) == plan
    _, one, once = _step(batch, networks, made)
    monkeypatch.setattr("learner.rl.experience.plan_passes", lambda *_: "separate")
    _, two, twice = _step(batch, twin, made)
    assert not torch.equal(_weights(networks), torch.zeros_like(_weights(networks)))
    assert torch.equal(_weights(networks), _weights(twin))
    assert once == pytest.approx(twice, rel=1e-6, abs=1e-7, nan_ok=True)
    assert once["policy/ratio_max"] == 1.0
    for name in ("logp", "entropy", "importance", "kl"):
        ours, theirs = getattr(one, name), getattr(two, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6, msg=name)


def test_two_updates_or_no_memory_take_two_passes(world: ModuleType, tiny: Path) -> None:
    for learner in ({"epochs": 2}, {"minibatches": 2}, {"activation_memory_mb": 0}):
        _, networks, made = _world(world, tiny, learner=learner)
        assert plan_passes(made, networks, value_only=False) == "separate"
    _, networks, made = _world(world, tiny)
    assert plan_passes(made, networks, value_only=True) == "separate"


def test_a_graph_over_the_limit_is_let_go(
    world: ModuleType, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, networks, made = _world(world, tiny)
    twin = copy.deepcopy(networks)
    kept = build_experience(batch, networks, made, PLAN)
    assert kept.waiting is not None
    assert len(kept.waiting) == len(kept.micros.of(range(len(batch)))) > 1
    monkeypatch.setattr("learner.rl.measuring_pass._memory_limit", lambda *_: 1000.0)
    assert build_experience(batch, networks, made, PLAN).waiting is None
    _step(batch, networks, made)
    monkeypatch.undo()
    _step(batch, twin, made)
    assert torch.equal(_weights(networks), _weights(twin))


@pytest.mark.parametrize("variant", [KEPT[0], KEPT[1], INLINE[0]], ids=str)
def test_packed_rows_give_the_padded_step(
    world: ModuleType, tiny: Path, variant: dict[str, Any]
) -> None:
    results = []
    for packing in ("padded", "packed"):
        # One plain gradient step: Adam would turn rounding of tiny gradients into whole steps.
        learner = {**variant.get("learner", {}), "packing": packing, "eps": 1.0}
        batch, networks, made = _world(world, tiny, **{**variant, "learner": learner})
        before = _weights(networks)
        micros = Microbatches(OwnRows.all_of(batch), 64, "cpu", packed=networks.packed).of(
            range(len(batch))
        )
        assert all((m.spans is not None) == (packing == "packed") for m in micros)
        logp = torch.zeros(len(batch), int(batch.response_ids.lengths.max()))
        for micro in micros:
            micro.put(logp, policy_outputs(networks.policy, micro, 0.9, "float32").logp)
        experience, _, metrics = _step(batch, networks, made)
        moved = (_weights(networks) - before) / made.learner.lr
        results.append((logp, experience, metrics, moved))
    (logp, padded, metrics, moved), (other_logp, packed, other_metrics, other_moved) = results
    torch.testing.assert_close(logp, other_logp, rtol=0, atol=1e-5)
    assert moved.abs().max() > 1e-3
    torch.testing.assert_close(moved, other_moved, rtol=0, atol=1e-5)
    torch.testing.assert_close(padded.advantages, packed.advantages, rtol=0, atol=1e-4)
    assert metrics == pytest.approx(other_metrics, rel=1e-4, abs=2e-5, nan_ok=True)


def test_packed_samples_never_see_each_other(world: ModuleType, tiny: Path) -> None:
    batch, networks, _ = _world(world, tiny, learner={"packing": "packed"})
    pack = Microbatches(OwnRows.all_of(batch), 4096, "cpu", packed=True).of(range(len(batch)))[0]
    assert pack.input_ids.shape == (1, int(batch.lengths.sum()))
    assert pack.spans is not None
    with torch.no_grad():
        before = policy_outputs(networks.policy, pack, 1.0, "float32").logp
        first = int(pack.spans.offsets[1])
        pack.input_ids[0, :first] = 3
        after = policy_outputs(networks.policy, pack, 1.0, "float32").logp
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1:], after[1:])


def test_packing_is_chosen_by_machine_and_refused_where_it_would_be_wrong(
    world: ModuleType, tiny: Path
) -> None:
    assert build_networks(world.make_settings(tiny))[0].packed
    gemma = transformers.AutoConfig.for_model("gemma2")
    window = transformers.AutoConfig.for_model("mistral", sliding_window=32)
    llama = transformers.AutoConfig.for_model("llama")
    assert [is_plain_causal(config) for config in (gemma, window, llama)] == [False, False, True]
    windowed = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(
            "mistral",
            vocab_size=24,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            sliding_window=4,
        )
    )
    from learner.models.packed_attention import choose_layout

    with pytest.raises(UserError, match="sliding window"):
        choose_layout("packed", torch.device("cpu"), "float32", windowed)
    assert not choose_layout("auto", torch.device("cuda"), "bfloat16", windowed)


def test_bfloat16_gives_the_float32_loss_and_gradient_within_its_rounding(
    world: ModuleType, tiny: Path
) -> None:
    grads = []
    for dtype in ("float32", "bfloat16"):
        model = ModelConfig(path=str(tiny), dtype=dtype)
        batch, networks, _ = _world(world, tiny, model=model)
        micro = Microbatches(OwnRows.all_of(batch), 4096, "cpu").of(range(len(batch)))[0]
        policy = networks.policy
        out = policy_outputs(policy, micro, 0.8, dtype, entropy=True, entropy_gradient=True)
        assert out.logp.dtype == torch.float32
        assert out.entropy is not None
        loss = (out.logp * torch.linspace(-1, 1, out.logp.shape[1])).sum() + out.entropy.sum()
        loss.backward()
        every = [p.grad for p in policy.parameters()]
        assert all(g.dtype == torch.float32 for g in every)
        grads.append((float(loss.detach()), torch.cat([g.flatten() for g in every])))
    (exact_loss, exact), (loss, found) = grads
    assert loss == pytest.approx(exact_loss, rel=1e-2)
    assert 1e-4 < float((found - exact).norm() / exact.norm()) < 2e-2
    assert float(torch.cosine_similarity(found, exact, dim=0)) > 0.9998


def test_a_reduced_head_keeps_float32_logits_and_the_gradient_of_sure_tokens() -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(40, 16, generator=generator)
    weight = 2.0 * torch.randn(50, 16, generator=generator)
    labels = (hidden @ weight.T).argmax(dim=-1)
    up = torch.randn(40, generator=generator)
    found = []
    for reduced in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logp, entropy = LmHead(w, None).logprobs(h, labels, 0.7, entropy=True, reduced=reduced)
        found.append((logp, entropy, *torch.autograd.grad((logp * up).sum(), [h, w])))
    for exact, short in zip(*(f[:2] for f in found), strict=True):
        assert torch.equal(exact, short)
    sure = found[0][0] > -1e-2
    assert sure.sum() >= 10
    for rows in (slice(None), sure):
        exact, short = found[0][2][rows], found[1][2][rows]
        assert float((exact - short).norm() / exact.norm()) < 1e-2
    assert float((found[0][3] - found[1][3]).norm() / found[0][3].norm()) < 1e-2


def test_weights_cast_once_for_all_microbatches_still_get_their_gradient(
    world: ModuleType, tiny: Path
) -> None:
    model = ModelConfig(path=str(tiny), dtype="bfloat16")
    batch, networks, _ = _world(world, tiny, model=model)
    micros = Microbatches(OwnRows.all_of(batch), 32, "cpu").of(range(len(batch)))
    assert len(micros) > 2
    policy, grads = networks.policy, []
    for shared in (True, False):
        policy.zero_grad(set_to_none=True)
        with compute_in("bfloat16" if shared else "float32", "cpu"):
            for micro in micros:
                policy_outputs(policy, micro, 1.0, "bfloat16").logp.sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    np.testing.assert_array_equal(grads[0].numpy(), grads[1].numpy())
