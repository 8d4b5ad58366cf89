"""Rollouts that were sampled with limits: the transformers engine and the learner agree."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from actors.engines.transformers_engine import TransformersEngine
from actors.settings import EngineSettings
from cluster.contracts.errors import Fatal
from cluster.contracts.metrics import values
from cluster.contracts.records import (
    Completion,
    Prompt,
    Rollout,
    RolloutGroup,
    Score,
    StepInput,
)
from cluster.contracts.rollout_table import from_table, to_table
from learner.rl.experience import StepPlan, build_experience
from learner.rl.learner import PPOLearner
from learner.rl.networks import build_networks
from learner.rl.rollouts import read_batch

LIMITS: list[dict[str, Any]] = [
    {"top_k": 5},
    {"top_k": 20, "top_p": 0.6},
    {"top_k": 24, "min_p": 0.5},
    {"min_tokens": 3},
    {"banned_tokens": (4, 9)},
    {"allowed_tokens": (1, 3, 5, 7, 11)},
    {"top_k": 6, "top_p": 0.9, "min_p": 0.05, "min_tokens": 2, "banned_tokens": (8,)},
]
TEMPERATURE, GROUPS, SAMPLES = 0.7, 4, 2


def sampled(path: Path, **limits: Any) -> list[RolloutGroup]:
    """Groups of the transformers engine."""
    engine = TransformersEngine(
        EngineSettings(
            model_path=str(path),
            max_tokens=8,
            stop_token_ids=(1,),
            max_model_len=32,
            temperature=TEMPERATURE,
            seed=5,
            **limits,
        )
    )
    engine.version = 0
    prompts = [Prompt(id=f"p{g}", messages=(), token_ids=(2 + g, 7, 5)) for g in range(GROUPS)]
    for g, prompt in enumerate(prompts):
        for s in range(SAMPLES):
            engine.submit(f"{g}/{s}", prompt.token_ids, None)
    done: dict[str, Completion] = {}
    while engine.unfinished:
        done.update(engine.step())
    return [
        RolloutGroup(
            group_id=g,
            samples=tuple(
                (
                    Rollout(prompt=prompt, completion=done[f"{g}/{s}"], sample_index=s, text=""),
                    Score(value=float(g - s), scorer_version="t"),
                )
                for s in range(SAMPLES)
            ),
        )
        for g, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("packing", ["padded", "packed"])
def test_current_and_reference_agree_with_the_engine(
    world: ModuleType, tiny: Path, limits: dict[str, Any], packing: str
) -> None:
    settings = world.make_settings(tiny, temperature=TEMPERATURE, learner={"packing": packing})
    networks, _ = build_networks(settings)
    batch = read_batch([to_table(sampled(tiny, **limits))], range(GROUPS), SAMPLES)
    assert batch.sampled_from is not None
    experience = build_experience(batch, networks, settings, StepPlan(step=0, kl_coef=0.1))
    mask = experience.mask
    off = (experience.proximal.logp - experience.behaviour_logp).where(mask, 0.0).abs()
    assert float(off.max()) < 1e-5
    assert experience.ref_logp is not None
    same = (experience.ref_logp - experience.proximal.logp).where(mask, 0.0).abs()
    assert float(same.max()) < 1e-6
    assert torch.isfinite(experience.proximal.entropy).all()


def forbidden(batch: Any, vocabulary: int) -> Tensor:
    """bool [N, V] by a loop over tokens."""
    sampled_from = batch.sampled_from
    out = torch.zeros(len(sampled_from.set_of), vocabulary, dtype=torch.bool)
    for token, one in enumerate(sampled_from.set_of):
        if one >= 0:
            listed = torch.zeros(vocabulary, dtype=torch.bool)
            listed[sampled_from.ids.row(one).astype(np.int64)] = True
            out[token] = ~listed if sampled_from.counts[one] > 0 else listed
    return out


def test_a_step_s_gradient_is_that_of_masked_logits(
    world: ModuleType, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """REINFORCE with a KL in the loss and an entropy bonus, against plain torch."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: kept(self))
    found: list[Tensor] = []

    def kept(optimizer: torch.optim.Optimizer) -> None:
        groups = optimizer.param_groups
        found.extend(p.grad.clone() for g in groups for p in g["params"] if p.grad is not None)

    algorithm = {
        "advantage": "grpo", "loss": "reinforce", "entropy_coef": 0.3,
        "kl": {"place": "loss", "estimator": "k2", "coef": 0.2},
    }  # fmt: skip
    settings = world.make_settings(
        tiny, temperature=TEMPERATURE, algorithm=algorithm, learner={"max_grad_norm": 1e9}
    )
    learner = PPOLearner(settings, world.KeepingPublisher())
    learner.start()
    policy = learner.state.networks.policy
    with torch.no_grad():  # away from the reference, so that the KL has a gradient
        policy.model.norm.weight += 0.3
    table = to_table(sampled(tiny, **LIMITS[-1]))
    learner.step(StepInput(step=0, group_ids=tuple(range(GROUPS)), payloads=(table,)))
    batch = read_batch([table], range(GROUPS), SAMPLES)
    networks, _ = build_networks(settings)
    experience = build_experience(
        batch, learner.state.networks, settings, StepPlan(step=0, kl_coef=0.2)
    )
    mask = forbidden(batch, world.VOCAB)
    policy.zero_grad()
    losses, at = [], 0
    for row in range(len(batch)):
        prompt, answer = batch.prompt_ids.row(row), batch.response_ids.row(row)
        ids = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))[None]
        places = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        label = ids[0, len(prompt) :]

        def logps(model: Any, ids: Tensor = ids, places: slice = places, at: int = at) -> Tensor:
            logits = model(input_ids=ids).logits[0, places].float() / TEMPERATURE
            limit = mask[at : at + logits.shape[0]]
            return logits.masked_fill(limit, -torch.inf).log_softmax(-1)

        every = logps(policy)
        logp = every.gather(1, label[:, None])[:, 0]
        with torch.no_grad():
            ref = logps(networks.reference).gather(1, label[:, None])[:, 0]
        entropy = -(every.exp() * every.masked_fill(every == -torch.inf, 0.0)).sum(-1)
        n = len(label)
        weight = (logp.detach() - experience.behaviour_logp[row, :n]).exp().clamp(max=5.0)
        advantage = experience.advantages[row, :n]
        # "decoupled": the policy of now over the engine's, capped, multiplies the whole loss.
        loss = -advantage * logp * weight
        loss = loss - 0.3 * entropy + 0.2 * weight * 0.5 * (logp - ref) ** 2
        losses.append(loss)
        at += n
    torch.cat(losses).mean().backward()
    expected = [p.grad for p in policy.parameters() if p.grad is not None]
    assert len(found) == len(expected)
    key = lambda g: (g.ndim < 2,)  # noqa: E731
    for ours, plain in zip(sorted(found, key=key), sorted(expected, key=key), strict=True):
        torch.testing.assert_close(ours, plain, atol=2e-6, rtol=1e-4)
    learner.close()


def test_no_limit_carries_nothing(world: ModuleType, tiny: Path) -> None:
    table = to_table(sampled(tiny))
    assert read_batch([table], range(GROUPS), SAMPLES).sampled_from is None
    assert table.column("set_ids").combine_chunks().flatten().nbytes == 0


def test_rollouts_written_before_there_were_sets_are_read(tiny: Path) -> None:
    table = to_table(sampled(tiny)).drop_columns(["set_end", "set_count", "set_ids"])
    assert read_batch([table], range(GROUPS), SAMPLES).sampled_from is None
    assert from_table(table)[0].samples[0][0].completion.sampled_from is None


def test_limited_and_unlimited_rollouts_train_together(world: ModuleType, tiny: Path) -> None:
    limited, plain = sampled(tiny, top_k=3), sampled(tiny)
    groups = [plain[0], limited[1], plain[2], limited[3]]
    table = to_table(groups)
    assert from_table(table) == groups
    settings = world.make_settings(tiny, temperature=TEMPERATURE)
    networks, _ = build_networks(settings)
    batch = read_batch([table], range(GROUPS), SAMPLES)
    experience = build_experience(batch, networks, settings, StepPlan(step=0, kl_coef=0.1))
    off = (experience.proximal.logp - experience.behaviour_logp).where(experience.mask, 0.0).abs()
    assert float(off.max()) < 1e-5


def test_a_trained_step_says_that_the_policies_agree(world: ModuleType, tiny: Path) -> None:
    settings = world.make_settings(tiny, temperature=TEMPERATURE)
    learner = PPOLearner(settings, world.KeepingPublisher())
    learner.start()
    table = to_table(sampled(tiny, **LIMITS[-1]))
    result = learner.step(StepInput(step=0, group_ids=tuple(range(GROUPS)), payloads=(table,)))
    assert values(result.metrics)["policy/ratio_max"] == pytest.approx(1.0, abs=1e-4)
    learner.close()


@pytest.mark.parametrize("damage", ["token", "count", "end"])
def test_sets_that_cannot_be_right_are_refused(tiny: Path, damage: str) -> None:
    table = to_table(sampled(tiny, top_k=3))
    column = {"token": "set_ids", "count": "set_count", "end": "set_end"}[damage]
    rows = table.column(column).to_pylist()
    if damage == "token":
        rows[0] = [23 - (i % 3) for i in range(len(rows[0]))]
        rows[0][:3] = [t for t in range(2, 24) if t != table.column("token_ids")[0].as_py()[0]][:3]
    else:
        rows[0][-1] += 1
    broken = table.set_column(
        table.column_names.index(column), column, pa.array(rows, pa.list_(pa.int32()))
    )
    words = "is not among those" if damage == "token" else "do not cover each token"
    with pytest.raises(Fatal, match=words):
        read_batch([broken], range(GROUPS), SAMPLES)


def test_a_completion_of_a_stop_string_is_no_cut_one(tiny: Path) -> None:
    plain = [r.completion for g in sampled(tiny) for r, _ in g.samples]
    assert {c.finish_reason for c in plain} >= {"length"}
    groups = sampled(tiny, stop=("w1", "w2"))  # half of the words: w10 to w19, w2, w20 to w23
    done = [r.completion for g in groups for r, _ in g.samples]
    ends = [i for i in range(2, 24) if str(i)[0] in "12"]
    assert all(not set(c.token_ids[:-1]) & set(ends) for c in done)
    assert all((c.finish_reason == "stop") == (c.token_ids[-1] in [1, *ends]) for c in done)
    assert sum(c.token_ids[-1] in ends for c in done) >= 4
    batch = read_batch([to_table(groups)], range(GROUPS), SAMPLES)
    assert not batch.truncated[[c.finish_reason == "stop" for c in done]].any()
