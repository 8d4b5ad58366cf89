"""A learner of adapters: the base never moves, it is the reference, and little else is held."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.contracts.config.base import ModelConfig
from cluster.contracts.config.lora import LoraConfig
from cluster.contracts.errors import UserError
from cluster.contracts.metrics import values
from cluster.contracts.records import StepInput
from cluster.weights.merging import base_fingerprint, factors_by_weight
from learner.models.lora import adapter_tensors, base_tensors, merged_tensors
from learner.models.merged_export import write_merged
from learner.rl.learner import PPOLearner
from learner.rl.replay import different_tensor

STEPS = 3
KL = {"kl": {"coef": 0.1, "estimator": "k1"}}
PLAIN = {"lr": 0.1, "eps": 1.0, "tokens_per_microbatch": 48}


@pytest.fixture(scope="module")
def tables(world: ModuleType, tiny: Path) -> list[pa.Table]:
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    return [
        world.table_of(world.make_groups(model, seed=step, first_group=4 * step))
        for step in range(STEPS)
    ]


class Run:
    """A started learner of adapters, what it published, and the metrics of its steps."""

    def __init__(self, world: ModuleType, tiny: Path, tables: list[pa.Table], **given: Any) -> None:
        learner = {**PLAIN, **given.pop("learner", {})}
        algorithm = {**KL, **given.pop("algorithm", {})}
        given = {"lora": LoraConfig(rank=4), "staleness": {"bound": STEPS}, **given}
        self.publisher = world.KeepingPublisher()
        settings = world.make_settings(tiny, learner=learner, algorithm=algorithm, **given)
        self.learner = PPOLearner(settings, self.publisher)
        self.first = self.learner.start()
        self.networks = self.learner.state.networks
        self.base = {n: t.detach().clone() for n, t in base_tensors(self.networks.policy).items()}
        self.metrics: list[dict[str, float]] = []
        for step, table in enumerate(tables):
            groups = tuple(4 * step + g for g in range(4))
            result = self.learner.step(StepInput(step=step, group_ids=groups, payloads=(table,)))
            found = values(result.metrics).items()
            self.metrics.append({n: v for n, v in found if not n.startswith(("time/", "perf/"))})
            self.last = result.manifest


VARIANTS: dict[str, dict[str, Any]] = {
    "shared": {},
    "own": {"learner": {"value_model": "own"}},
    "grpo": {"algorithm": {"advantage": "grpo"}},
    "several": {"learner": {"epochs": 2, "minibatches": 2}},
    "bfloat16": {"rollout_dtype": "bfloat16", "learner": {"value_model": "own"}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_learn_and_the_base_stays(
    world: ModuleType, tiny: Path, tables: list[pa.Table], variant: str
) -> None:
    given = dict(VARIANTS[variant])
    if variant == "bfloat16":
        given["model"] = ModelConfig(path=str(tiny), dtype="bfloat16")
    run = Run(world, tiny, tables, **given)
    networks, dtype = run.networks, run.networks.compute_dtype
    for name, tensor in base_tensors(networks.policy).items():
        assert torch.equal(tensor, run.base[name]), name
        assert tensor.dtype == getattr(torch, dtype)
    original = AutoModelForCausalLM.from_pretrained(tiny).named_parameters()
    assert run.first.lora is not None
    assert run.first.lora.base == base_fingerprint(original, dtype)
    # What is published is the adapter, in its own precision, whatever the engines compute in.
    factors = adapter_tensors(networks.policy)
    assert {t.name for t in run.last.tensors} == set(factors)
    assert {t.dtype for t in run.last.tensors} == {"float32"}
    assert run.last.dtype == given.get("rollout_dtype", "float32")
    for name, tensor in factors.items():
        assert (torch.from_numpy(run.publisher.arrays[name]) == tensor).all()
    assert all(float(b.detach().abs().max()) > 0 for _, b in factors_by_weight(factors).values())
    # The optimisers hold the adapters, and of a value network its adapters and head.
    optimizers = run.learner.state.optimizers
    trained = [p for group in optimizers.policy.param_groups for p in group["params"]]
    heads = 33 if networks.shared else 0
    assert sum(p.numel() for p in trained) == sum(t.numel() for t in factors.values()) + heads
    if variant in ("own", "bfloat16"):
        value: Any = networks.value
        shared = base_tensors(value.trunk)
        assert all(shared[n.removeprefix("model.")] is t for n, t in _trunk(networks.policy))
        assert value.trunk.layers[0].mlp.up_proj.lora_B.default.weight.abs().max() > 0


def _trunk(policy: Any) -> list[tuple[str, torch.Tensor]]:
    return [(n, t) for n, t in base_tensors(policy).items() if n.startswith("model.")]


def test_the_reference_is_the_base_at_every_step(
    world: ModuleType, tiny: Path, tables: list[pa.Table]
) -> None:
    """A second model gives the same numbers, bit for bit; only the first holds no second model."""
    own = Run(world, tiny, tables)
    named = Run(world, tiny, tables, learner={"reference_path": str(tiny)})
    assert own.networks.reference is own.networks.policy
    assert named.networks.reference is not named.networks.policy
    assert own.metrics == named.metrics
    assert own.last.tensors == named.last.tensors
    assert own.metrics[0]["objective/kl"] == 0.0
    assert own.metrics[-1]["objective/kl"] != 0.0


@pytest.mark.parametrize(
    "how",
    [{"gradient_checkpointing": True}, {"packing": "packed"}, {"activation_memory_mb": 0}],
    ids=str,
)
def test_how_a_pass_is_computed_does_not_change_what_is_learnt(
    world: ModuleType, tiny: Path, tables: list[pa.Table], how: dict[str, Any]
) -> None:
    plain, other = Run(world, tiny, tables), Run(world, tiny, tables, learner=how)
    ours, theirs = (adapter_tensors(run.networks.policy) for run in (plain, other))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-6)


def test_the_canary_is_that_of_the_merged_weights(
    world: ModuleType, tiny: Path, tables: list[pa.Table]
) -> None:
    """An engine holds W + s B A, in its own type: that is what its numbers are compared with."""
    for dtype, tolerance in (("float32", 2e-6), ("bfloat16", 2e-6)):
        run = Run(world, tiny, tables, rollout_dtype=dtype, learner={"lr": 1.0, "eps": 1e-8})
        engine = AutoModelForCausalLM.from_pretrained(tiny).eval()
        merged = dict(merged_tensors(run.networks.policy, getattr(torch, dtype)))
        engine.load_state_dict({n: t.float() for n, t in merged.items()}, strict=False)
        ids = torch.tensor([run.last.canary.token_ids])
        with torch.no_grad():
            every = engine(ids).logits[0, :-1].log_softmax(dim=-1)
        wanted = every.gather(1, ids[0, 1:, None])[:, 0]
        found = torch.tensor(run.last.canary.logprobs)
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


def test_a_checkpoint_holds_the_adapter_and_goes_on_exactly(
    world: ModuleType, tiny: Path, tables: list[pa.Table], tmp_path: Path
) -> None:
    how = {"learner": {"value_model": "own", "lr": 1e-3, "eps": 1e-8}}
    whole, half = Run(world, tiny, tables, **how), Run(world, tiny, tables[:2], **how)
    half.learner.save(tmp_path / "half")
    names = {path.name for path in (tmp_path / "half").iterdir()}
    assert "policy" not in names
    held = {n for file in (tmp_path / "half").rglob("*.safetensors") for n in load_file(file)}
    assert {n for n in held if "lora_" not in n and "value.head." not in n} == {"cpu"}
    on = Run(world, tiny, [], resume_from=str(tmp_path / "half"), **how)
    batch = StepInput(step=2, group_ids=(8, 9, 10, 11), payloads=(tables[2],))
    assert on.learner.step(batch).manifest.tensors == whole.last.tensors
    other = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        other.model.norm.weight.add_(1e-3)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="the base of the adapters"):
        Run(world, tmp_path / "other", [], resume_from=str(tmp_path / "half"), **how)


def test_what_a_run_hands_over_is_the_merged_model_bit_for_bit(
    world: ModuleType, tiny: Path, tables: list[pa.Table], tmp_path: Path
) -> None:
    for dtype in ("float32", "bfloat16"):
        model = ModelConfig(path=str(tiny), dtype=dtype)
        run = Run(world, tiny, tables[:1], model=model, rollout_dtype=dtype)
        run.learner.save(tmp_path / dtype)
        made = write_merged(tmp_path / dtype / "adapter", model, tmp_path / f"{dtype}-out", dtype)
        policy = run.networks.policy
        assert different_tensor(policy, made) is None
        assert different_tensor(policy, tmp_path / dtype / "adapter") is None
        loaded = AutoModelForCausalLM.from_pretrained(made)
        assert loaded.dtype == getattr(torch, dtype)
        wanted = dict(merged_tensors(policy, loaded.dtype))
        assert all(torch.equal(wanted[n], p) for n, p in loaded.named_parameters())
        assert AutoTokenizer.from_pretrained(made).eos_token == "<eos>"
    short = ModelConfig(path=str(world.make_model(tmp_path / "short", layers=1)))
    with pytest.raises(UserError, match="no adapter of"):
        write_merged(tmp_path / "float32" / "adapter", short, tmp_path / "no", "float32")
    assert not (tmp_path / "no").exists()
