"""Models in parts on four processes: the bits of a whole load, and with each way of saving memory
the loss, gradients and steps of one process.

This file is also the program that each of the processes runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from cluster.contracts.config.base import DType, ModelConfig
from cluster.contracts.config.compute import ComputeConfig
from learner.compute.mesh import ALONE, Mesh
from learner.compute.optimizer import make_optimizer
from learner.compute.optimizer_step import SkipCounter, optimiser_step
from learner.compute.ranks import Ranks, join, meeting_place, whole
from learner.compute.sharding import call, local
from learner.models.load import load_policy
from learner.models.placement import Placement

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.parallel]

ROOT = Path(__file__).resolve().parents[4]
PROCESSES, MICROBATCHES, STEPS = 4, 8, 3
TIMEOUT_S = 300.0
DEVICE = torch.device("cpu")
RECOMPUTED: dict[str, Any] = {"gradient_checkpointing": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kept after forward": {"reshard_after_forward": False},
    "prefetched": {"prefetch_layers": 2},
    "reduced once": {"gradient_reduction": "step"},
    "recomputed": RECOMPUTED,
    "activations on host": {**RECOMPUTED, "offload": ["activations"]},
    "parameters on host": {"offload": ["parameters"]},
    "moments on host": {"offload": ["optimizer"]},
    "all": {**RECOMPUTED, "offload": ["activations", "parameters"], "gradient_reduction": "step"},
}
SIZES = {"qwen2": {"tie_word_embeddings": True}, "llama": {}, "qwen3_moe": {"num_experts": 4}}
"""Vocabulary of 33 and heads of few rows: nothing comes out even over four processes."""


def save_models(folder: Path) -> None:
    for kind, more in SIZES.items():
        config = transformers.AutoConfig.for_model(
            kind,
            **{
                **dict.fromkeys(("num_attention_heads", "num_experts_per_tok"), 2),
                **{"vocab_size": 33, "hidden_size": 64, "intermediate_size": 90},
                **{"moe_intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 32},
                **{"num_hidden_layers": 3, "max_position_embeddings": 64},
                **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
                **more,
            },
        )
        torch.manual_seed(5)
        model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        model.save_pretrained(folder / kind, max_shard_size="20KB")


def microbatches(model: Any, ranks: Ranks, root: Any) -> Iterator[Any]:
    """This rank's share of eight, as calls that give its part of one mean loss."""
    generator = torch.Generator().manual_seed(9)
    rows = torch.randint(3, 33, (MICROBATCHES, 2, 12), generator=generator)

    def loss_of(inner: Any, ids: Tensor) -> tuple[Tensor]:
        logits = inner(input_ids=ids, use_cache=False).logits[:, :-1].float()
        return (torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()),)

    for at in range(ranks.rank, MICROBATCHES, ranks.size):
        yield lambda ids=rows[at]: (call(root, loss_of, ids)[0] / MICROBATCHES, [])


class Noted(torch.optim.SGD):
    """Keeps the whole gradients of its last step."""

    noted: list[Tensor]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.noted = [whole(p.grad).clone() for g in self.param_groups for p in g["params"]]
        super().step()


def train(
    model: Any, root: Any, mesh: Mesh, compute: ComputeConfig, learns: bool
) -> dict[str, Any]:
    """Losses, gradient norms, gradients of one plain step, or weights after three of AdamW."""
    optimizer: Any = Noted(model.parameters(), lr=0.1)
    if learns:
        optimizer = make_optimizer(
            model.parameters(),
            *(0.01, (0.9, 0.95), 1e-4, 0.1),
            eight_bits=compute.optimizer == "adamw8bit",
            on_host="optimizer" in compute.offload,
        )
    outcomes = []
    for _ in range(STEPS if learns else 1):
        once = [root] if compute.gradient_reduction == "step" else []
        share = microbatches(model, mesh.everyone, root)
        outcome = optimiser_step(
            optimizer, model.parameters(), share, 1e9, SkipCounter(), mesh, once
        )
        outcomes.append((outcome.loss, outcome.grad_norm))
    found = {"outcomes": outcomes, "weights": [whole(p.detach()) for p in model.parameters()]}
    return found if learns else {**found, "gradients": optimizer.noted}


def placed(folder: Path, kind: str, mesh: Mesh, options: dict[str, Any], dtype: DType) -> Any:
    compute = ComputeConfig(processes=mesh.everyone.size, sharding="fsdp2", **options)
    place = Placement(compute=compute, device=DEVICE, dtype=dtype, mesh=mesh)
    model, root = place.load_policy(ModelConfig(path=str(folder / kind)))
    return place, model, root


def work(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = join(rank, PROCESSES, ("127.0.0.1", port), gpu=False, timeout_s=TIMEOUT_S)
    mesh, found = Mesh.of(ranks), dict[Any, Any]()
    for kind in SIZES:
        _, model, _ = placed(folder, kind, mesh, {}, "float32")
        found["loaded", kind] = {n: whole(p.detach()) for n, p in model.named_parameters()}
        found["held", kind] = sum(local(p).numel() for p in model.parameters())
    place, *_ = placed(folder, "llama", mesh, RECOMPUTED, "bfloat16")
    value = place.load_value(ModelConfig(path=str(folder / "llama")), None)
    ids = torch.arange(3, 23).view(2, 10)
    found["checkpointed"] = value.trunk.is_gradient_checkpointing
    found["values"] = value(ids, torch.ones_like(ids)).detach()
    found["trunk"] = {n: whole(p.detach()) for n, p in value.trunk.named_parameters()}
    reference, root = place.load_policy(ModelConfig(path=str(folder / "llama")), frozen=True)
    found["reference"] = sorted({str(p.dtype) for p in reference.parameters()})
    with torch.no_grad():
        logits = [
            call(each, lambda inner, row: (inner(input_ids=row).logits,), ids)[0]
            for each in (root, placed(folder, "llama", mesh, {}, "bfloat16")[2])
        ]
    found["same as policy"] = torch.equal(*logits)
    for name, options in OPTIONS.items():
        for learns in (False, True):
            for dtype in ("float32", "bfloat16") if name in ("plain", "all") else ("float32",):
                place, model, root = placed(folder, "qwen2", mesh, options, dtype)  # type: ignore[arg-type]
                found[name, dtype, learns] = train(model, root, mesh, place.compute, learns)
    torch.save(found, folder / f"found-{rank}.pt")
    ranks.leave()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("four")
    save_models(place)
    return place


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[Any, Any]]:
    store = meeting_place("127.0.0.1", TIMEOUT_S)
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(store.port), str(folder)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(PROCESSES)
    ]
    try:
        assert [process.wait(900) for process in processes] == [0] * PROCESSES
    finally:
        for process in processes:
            process.kill()
            process.wait(10)
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[Any, Any]:
    """What one process finds, with float32 numbers."""
    return {
        (kind, learns): train(
            (model := load_policy(ModelConfig(path=str(folder / kind)))),
            model,
            ALONE,
            ComputeConfig(),
            learns,
        )
        for kind in ("qwen2",)
        for learns in (False, True)
    }


@pytest.mark.parametrize("kind", SIZES)
def test_each_process_holds_a_part_of_what_a_whole_load_gives(
    folder: Path, found: list[dict[Any, Any]], kind: str
) -> None:
    expected = dict(load_policy(ModelConfig(path=str(folder / kind))).named_parameters())
    for rank in found:
        assert rank["loaded", kind].keys() == expected.keys()
        assert all(torch.equal(t, expected[n]) for n, t in rank["loaded", kind].items())
    held = [rank["held", kind] for rank in found]
    total = sum(parameter.numel() for parameter in expected.values())
    assert sum(held) == total
    # 33 rows over four processes: 9, 9, 9 and 6.
    assert max(held) < 0.3 * total


@pytest.mark.parametrize("name", OPTIONS)
def test_no_way_of_saving_memory_changes_loss_gradients_or_steps(
    found: list[dict[Any, Any]], alone: dict[Any, Any], name: str
) -> None:
    one, three = alone["qwen2", False], alone["qwen2", True]
    for rank in found:
        got = rank[name, "float32", False]
        for (loss, norm), (wanted, wanted_norm) in zip(
            got["outcomes"], one["outcomes"], strict=True
        ):
            assert loss == pytest.approx(wanted, rel=1e-6)
            assert norm == pytest.approx(wanted_norm, rel=1e-5)
        for ours, theirs in zip(got["gradients"], one["gradients"], strict=True):
            assert (ours - theirs).abs().max() < 1e-6 * max(1.0, float(theirs.abs().max()))
        for ours, theirs in zip(
            rank[name, "float32", True]["weights"], three["weights"], strict=True
        ):
            assert (ours - theirs).abs().max() < 1e-4 * float(theirs.abs().max())


@pytest.mark.parametrize("name", ["plain", "all"])
def test_bfloat16_keeps_float32_weights_and_trains_almost_the_same(
    found: list[dict[Any, Any]], alone: dict[Any, Any], name: str
) -> None:
    one, three = alone["qwen2", False], alone["qwen2", True]
    for rank in found:
        got = rank[name, "bfloat16", False]
        assert got["outcomes"][0][0] == pytest.approx(one["outcomes"][0][0], rel=2e-3)
        flat = [torch.cat([g.flatten() for g in x["gradients"]]) for x in (got, one)]
        assert {g.dtype for g in got["gradients"]} == {torch.float32}
        assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.999
        last = rank[name, "bfloat16", True]["outcomes"][-1][0]
        assert last == pytest.approx(three["outcomes"][-1][0], rel=1e-2)


def test_a_value_network_and_a_reference_are_in_parts_too(
    folder: Path, found: list[dict[Any, Any]]
) -> None:
    expected = load_policy(ModelConfig(path=str(folder / "llama"))).base_model
    for rank in found:
        assert all(
            torch.equal(rank["trunk"][name], tensor) for name, tensor in expected.named_parameters()
        )
        assert torch.equal(rank["values"], torch.zeros(2, 10))
        assert rank["checkpointed"]
        # Half the memory, and still the log-probabilities of the policy that training starts from.
        assert rank["reference"] == ["torch.bfloat16"]
        assert rank["same as policy"]


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
