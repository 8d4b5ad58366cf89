"""Several policies on one base: each learns as if it were alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cluster.contracts.config.lora import LoraConfig
from cluster.contracts.errors import Fatal, UserError
from cluster.contracts.metrics import values
from cluster.contracts.records import RolloutGroup, StepInput
from learner.models.lora import adapter_tensors, base_tensors
from learner.rl.learner import PPOLearner
from learner.rl.policies import adapter_of
from learner.trainer_file import moved_on

STEPS = 3
OF_POLICY = {
    "brief": (0, 1),
    "train": (2, 3),
}  # places of a step's groups; a name peft would refuse
KL = {"coef": 0.05, "estimator": "k1", "controller": "adaptive", "target": 0.1}


def renamed(group: RolloutGroup, policy: str) -> RolloutGroup:
    samples = tuple(
        (
            dataclasses.replace(rollout, prompt=dataclasses.replace(rollout.prompt, policy=policy)),
            score,
        )
        for rollout, score in group.samples
    )
    return dataclasses.replace(group, samples=samples)


@pytest.fixture(scope="module")
def tables(world: ModuleType, tiny: Path) -> list[pa.Table]:
    """Of each step: two groups of each policy."""
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    made = []
    for step in range(STEPS):
        groups = world.make_groups(model, seed=step, first_group=4 * step)
        owner = {place: name for name, places in OF_POLICY.items() for place in places}
        named = [renamed(group, owner[place]) for place, group in enumerate(groups)]
        made.append(world.table_of(named))
    return made


class Run:
    def __init__(
        self,
        world: ModuleType,
        tiny: Path,
        tables: list[pa.Table],
        policies: tuple[str, ...],
        **algorithm: Any,
    ) -> None:
        self.publisher = world.KeepingPublisher()
        settings = world.make_settings(
            tiny,
            learner={"lr": 0.1, "eps": 1e-3, "tokens_per_microbatch": 48, "minibatches": 2},
            algorithm={"kl": KL, **algorithm},
            staleness={"bound": STEPS},
            lora=LoraConfig(rank=4),
            policies=policies,
        )
        self.learner = PPOLearner(settings, self.publisher)
        self.first = self.learner.start()
        self.base = self.weights()
        self.metrics = []
        for step, table in enumerate(tables):
            places = [place for name in policies for place in OF_POLICY[name]]
            groups = tuple(4 * step + place for place in sorted(places))
            result = self.learner.step(StepInput(step=step, group_ids=groups, payloads=(table,)))
            self.metrics.append(values(result.metrics))
            self.last = result

    def weights(self) -> dict[str, torch.Tensor]:
        model = self.learner.state.networks.policy
        return {name: tensor.detach().clone() for name, tensor in base_tensors(model).items()}

    def adapter(self, policy: str) -> dict[str, torch.Tensor]:
        return adapter_tensors(self.learner.state.networks.policy, adapter_of(policy))


@pytest.mark.parametrize("advantage", ["gae", "grpo"])
def test_an_adapter_trained_beside_another_is_bit_equal_to_one_trained_alone(
    world: ModuleType, tiny: Path, tables: list[pa.Table], advantage: str
) -> None:
    both = Run(world, tiny, tables, ("brief", "train"), advantage=advantage)
    for place, name in enumerate(OF_POLICY):
        alone = Run(world, tiny, tables, (name,), advantage=advantage)
        state, own = both.learner.state.each()[place], alone.learner.state
        assert state.policy == own.policy == name
        moved = 0.0
        for key, tensor in alone.adapter(name).items():
            assert torch.equal(tensor, both.adapter(name)[key]), key
            moved = max(moved, float(tensor.detach().abs().max()) if "lora_B" in key else 0.0)
        assert moved > 1e-3
        assert state.kl.coef == own.kl.coef != KL["coef"]
        if advantage == "gae":
            heads = (state.networks.value, own.networks.value)
            ours, theirs = (list(head.parameters()) for head in heads if head is not None)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        for metric in ("objective/scores", "policy/loss", "objective/kl"):
            assert both.metrics[-1][f"policies/{name}/{metric}"] == alone.metrics[-1][metric]
    one, other = (both.adapter(name) for name in OF_POLICY)
    assert any(not torch.equal(one[key], other[key]) for key in one)
    assert all(torch.equal(tensor, both.base[name]) for name, tensor in both.weights().items())


def test_what_is_published_is_every_adapter_each_with_its_canary(
    world: ModuleType, tiny: Path, tables: list[pa.Table]
) -> None:
    run = Run(world, tiny, tables, ("brief", "train"), advantage="grpo")
    wanted = {
        f"{name}/{key}": tensor for name in OF_POLICY for key, tensor in run.adapter(name).items()
    }
    assert set(run.publisher.arrays) == set(wanted)
    for key, tensor in wanted.items():
        assert (torch.from_numpy(run.publisher.arrays[key]) == tensor).all()
    manifest = run.last.manifest
    canaries = [manifest.canary, *manifest.more_canaries]
    assert [canary.adapter for canary in canaries] == ["brief", "train"]
    assert canaries[0].token_ids == canaries[1].token_ids
    assert canaries[0].logprobs != canaries[1].logprobs
    first = [run.first.canary, *run.first.more_canaries]
    assert first[0].logprobs == first[1].logprobs  # fresh adapters change nothing


def test_metrics_of_the_step_are_those_of_all_policies_merged(
    world: ModuleType, tiny: Path, tables: list[pa.Table]
) -> None:
    found = Run(world, tiny, tables, ("brief", "train"), advantage="grpo").metrics[0]
    parts = [found[f"policies/{name}/objective/scores"] for name in OF_POLICY]
    assert found["objective/scores"] == pytest.approx(sum(parts) / 2)


def test_a_policy_without_groups_in_a_step_stays_as_it_is(
    world: ModuleType, tiny: Path, tables: list[pa.Table]
) -> None:
    """As when all its groups of the step were left out."""
    run = Run(world, tiny, tables[:1], ("brief", "train"), advantage="grpo")
    before = {key: tensor.detach().clone() for key, tensor in run.adapter("train").items()}
    result = run.learner.step(StepInput(step=1, group_ids=(4, 5), payloads=(tables[1],)))
    assert result.version == 2
    assert all(torch.equal(t, before[key]) for key, t in run.adapter("train").items())
    assert {one.version for one in run.learner.state.each()} == {2}


def test_completions_of_an_unknown_policy_are_refused(
    world: ModuleType, tiny: Path, tables: list[pa.Table]
) -> None:
    run = Run(world, tiny, [], ("brief",), advantage="grpo")
    with pytest.raises(Fatal, match=r"completions of \['train'\], the run has \['brief'\]"):
        run.learner.step(StepInput(step=0, group_ids=(0, 2), payloads=(tables[0],)))


def test_a_checkpoint_holds_every_policy_and_training_goes_on_the_same(
    world: ModuleType, tiny: Path, tables: list[pa.Table], tmp_path: Path
) -> None:
    straight = Run(world, tiny, tables, ("brief", "train"), advantage="gae")
    first = Run(world, tiny, tables[:2], ("brief", "train"), advantage="gae")
    names = [file.name for file in first.learner.save(tmp_path)]
    for name in OF_POLICY:
        assert f"policies/{name}/adapter/adapter_model.safetensors" in names
        saved = load_file(tmp_path / "policies" / name / "adapter" / "adapter_model.safetensors")
        assert all(torch.equal(saved[key], t) for key, t in first.adapter(name).items())
    resumed = Run(world, tiny, [], ("brief", "train"), advantage="gae")
    resumed.learner.restore(tmp_path)
    result = resumed.learner.step(
        StepInput(step=2, group_ids=(8, 9, 10, 11), payloads=(tables[2],))
    )
    for name in OF_POLICY:
        wanted = straight.adapter(name)
        assert all(torch.equal(t, wanted[key]) for key, t in resumed.adapter(name).items())
    assert result.manifest.more_canaries == straight.last.manifest.more_canaries
    coefs = [one.kl.coef for one in resumed.learner.state.each()]
    assert coefs == [one.kl.coef for one in straight.learner.state.each()]


def test_going_back_moves_the_kl_coefficient_of_every_policy(
    world: ModuleType, tiny: Path, tables: list[pa.Table], tmp_path: Path
) -> None:
    run = Run(world, tiny, tables[:1], ("brief", "train"), advantage="grpo")
    run.learner.save(tmp_path)
    moved_on(tmp_path / "trainer.json", tmp_path / "trainer.json", version=5, kl_coef=0.5)
    run.learner.restore(tmp_path)
    assert [(one.version, one.kl.coef) for one in run.learner.state.each()] == [(5, 0.5)] * 2


def test_a_checkpoint_of_other_policies_is_refused(
    world: ModuleType, tiny: Path, tmp_path: Path
) -> None:
    Run(world, tiny, [], ("brief", "train")).learner.save(tmp_path)
    other = Run(world, tiny, [], ("train",))
    with pytest.raises(UserError, match="of the policies brief, train, the settings of train"):
        other.learner.restore(tmp_path)
