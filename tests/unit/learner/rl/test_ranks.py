"""A learner of two processes computes what one computes, however they divide the work.

This file is also the program that each of the two processes runs.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from cluster.contracts.config.learner import WeightsConfig
from cluster.contracts.config.lora import LoraConfig
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import PeerLost
from cluster.contracts.metrics import values
from cluster.contracts.records import StepInput
from learner.compute.ranks import SINGLE, Ranks, join, meeting_place, whole
from learner.compute.sharding import local
from learner.rl.learner import PPOLearner

ROOT = Path(__file__).resolve().parents[4]
TIMEOUT_S = 20.0
STEPS = 3
# One plain gradient step: Adam would turn rounding of tiny gradients into whole steps.
PLAIN = {"lr": 0.1, "eps": 1.0, "tokens_per_microbatch": 24}
VARIANTS: dict[str, dict[str, Any]] = {
    "shared": {"learner": {"epochs": 2, "minibatches": 2, "value_warmup_steps": 1}},
    "kept": {"algorithm": {"kl": {"controller": "adaptive", "target": 0.1}}},
    "own": {"learner": {"value_model": "own", "value_lr": 0.05, "minibatches": 2}},
    "grpo": {"algorithm": {"advantage": "grpo", "entropy_coef": 0.01}},
    "recomputed": {"learner": {"gradient_checkpointing": True}},
    "lora": {"lora": LoraConfig(rank=4), "learner": {"value_model": "own", "minibatches": 2}},
    "one-microbatch": {"learner": {"tokens_per_microbatch": 4096}},
}
MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "fsdp2": {"sharding": "fsdp2"},
    "sequence": {"sequence_parallel": 2},
    "tensor": {"tensor_parallel": 2},
}
# A plan for tensor parallelism names layers by the names that adapters change.
TOGETHER = [(m, v) for m in MODES for v in VARIANTS if (m, v) != ("tensor", "lora")]


def load_world() -> ModuleType:
    spec = importlib.util.spec_from_file_location("accord_world", ROOT / "tests" / "ppo_world.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Trained:
    """A learner on the tiny model, its steps and its numbers."""

    def __init__(
        self,
        task: dict[str, Any],
        variant: str,
        ranks: Ranks = SINGLE,
        mode: str = "none",
        resume_from: str | None = None,
    ) -> None:
        world, given = load_world(), VARIANTS[variant]
        self.tables = task["tables"]
        self.publisher = world.KeepingPublisher()
        several = {"processes": ranks.size, **MODES[mode]}
        settings = world.make_settings(
            Path(task["tiny"]),
            learner={**PLAIN, **several, **given.get("learner", {})},
            algorithm=given.get("algorithm"),
            lora=given.get("lora"),
            staleness={"bound": STEPS},
            resume_from=resume_from,
        )
        self.learner = PPOLearner(settings, self.publisher, ranks=ranks)
        self.learner.start()
        self.metrics: list[dict[str, float]] = []

    def steps(self, first: int, last: int) -> Trained:
        for step in range(first, last):
            groups = tuple(4 * step + g for g in range(4))
            batch = StepInput(step=step, group_ids=groups, payloads=(self.tables[step],))
            found = values(self.learner.step(batch).metrics)
            measured = {n: v for n, v in found.items() if not n.startswith(("time/", "perf/"))}
            self.metrics.append(measured)
        return self

    def result(self) -> dict[str, Any]:
        """Whole parameters (every rank has to ask), what was published, metrics, this share."""
        networks = self.learner.state.networks
        modules = {"policy": networks.policy, "value": networks.value}
        named = {
            f"{key}.{name}": parameter.detach()
            for key, module in modules.items()
            if module is not None
            for name, parameter in module.named_parameters()
        }
        return {
            "parameters": {name: whole(p).numpy().copy() for name, p in named.items()},
            "published": self.publisher.arrays,
            "metrics": self.metrics,
            "held": sum(local(p).numel() for p in named.values()),
        }


def rounded_start(task: dict[str, Any], ranks: Ranks, mode: str) -> dict[str, Any]:
    """What a learner publishes for engines in bfloat16, and its exact parameters afterwards."""
    world = load_world()
    publisher = world.KeepingPublisher()
    settings = world.make_settings(
        Path(task["tiny"]),
        learner={"processes": ranks.size, **MODES[mode]},
        rollout_dtype="bfloat16",
        weights=WeightsConfig(bucket_mb=0.004),
    )
    learner = PPOLearner(settings, publisher, ranks=ranks)
    manifest = learner.start()
    policy = learner.state.networks.policy
    return {
        "published": publisher.arrays,
        "buckets": manifest.buckets,
        "canary": manifest.canary.logprobs,
        "parameters": {n: whole(p.detach()).numpy().copy() for n, p in policy.named_parameters()},
    }


def work(rank: int, port: int, folder: Path) -> None:
    """One of the two processes: every variant, then checkpoints, then the death of rank 1."""
    torch.set_num_threads(1)
    task = ForkingPickler.loads((folder / "task.pkl").read_bytes())
    ranks = join(rank, 2, ("127.0.0.1", port), gpu=False, timeout_s=TIMEOUT_S)
    found: dict[Any, Any] = {}
    for mode, variant in TOGETHER:
        made = Trained(task, variant, ranks, mode).steps(0, STEPS)
        found[mode, variant] = made.result()
    for mode in MODES:
        found["rounded", mode] = rounded_start(task, ranks, mode)
    for mode, variant in (("none", "shared"), ("fsdp2", "own")):
        half = Trained(task, variant, ranks, mode).steps(0, 2)
        half.learner.save(folder / f"two-{mode}")
        on = Trained(task, variant, ranks, mode, str(folder / f"one-{variant}"))
        found["resumed", mode, variant] = on.steps(2, STEPS).result()
    (folder / f"found-{rank}.pkl").write_bytes(ForkingPickler.dumps(found))
    last = Trained(task, "shared", ranks, "fsdp2").steps(0, 1)
    ranks.barrier()
    if rank == 1:
        os._exit(3)
    began = time.perf_counter()
    try:
        last.steps(1, 2)
        ending = "no error"
    except (PeerLost, RuntimeError) as problem:
        ending = f"{type(problem).__name__}: {problem}"
    took = time.perf_counter() - began
    (folder / "ending.pkl").write_bytes(ForkingPickler.dumps((took, ending)))
    os._exit(0)  # nobody is left to say goodbye to


@pytest.fixture(scope="module")
def tiny(world: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As everybody's, with enough heads for two processes."""
    return Path(world.make_model(tmp_path_factory.mktemp("tiny") / "model", heads=4, keys=2))


@pytest.fixture(scope="module")
def task(world: ModuleType, tiny: Path) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    tables = [
        world.table_of(world.make_groups(model, seed=step, first_group=4 * step))
        for step in range(STEPS)
    ]
    return {"tiny": str(tiny), "tables": tables}


@pytest.fixture(scope="module")
def folder(
    task: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """(where the two processes wrote, what one process finds)."""
    place = tmp_path_factory.mktemp("two")
    (place / "task.pkl").write_bytes(ForkingPickler.dumps(task))
    alone = {}
    for variant in ("shared", "own"):
        half = Trained(task, variant).steps(0, 2)
        half.learner.save(place / f"one-{variant}")
        alone[variant] = half.steps(2, STEPS).result()
    store = meeting_place("127.0.0.1", TIMEOUT_S)
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(store.port), str(place)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        for variant in VARIANTS.keys() - alone.keys():
            alone[variant] = Trained(task, variant).steps(0, STEPS).result()
        codes = [process.wait(300) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait(10)
    assert codes == [0, 3]
    return place, alone


@pytest.fixture(scope="module")
def found(folder: tuple[Path, Any]) -> list[dict[Any, Any]]:
    return [
        ForkingPickler.loads((folder[0] / f"found-{rank}.pkl").read_bytes()) for rank in range(2)
    ]


def assert_same(got: dict[str, Any], wanted: dict[str, Any], steps: slice = slice(None)) -> None:
    assert got["parameters"].keys() == wanted["parameters"].keys()
    for name, tensor in wanted["parameters"].items():
        scale = np.abs(tensor).max() + 1e-3  # biases that started at 0
        difference = np.abs(got["parameters"][name] - tensor).max()
        assert difference < 1e-6 * scale, (name, difference / scale)
    for ours, theirs in zip(got["metrics"], wanted["metrics"][steps], strict=True):
        assert ours.keys() == theirs.keys()
        for name, number in theirs.items():
            # Of counted tokens, one may lie on the limit, where the last bit decides.
            near = 1e-2 if name.endswith("clipfrac") else 1e-6
            assert ours[name] == pytest.approx(number, rel=1e-5, abs=near), name


def _published_name(name: str) -> str:
    plain = name.removeprefix("policy.")
    return f"base_model.model.{plain.replace('.default.', '.')}" if ".lora_" in name else plain


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.parametrize(("mode", "variant"), TOGETHER)
def test_two_processes_train_what_one_trains(
    folder: tuple[Path, Any], found: list[dict[Any, Any]], tiny: Path, mode: str, variant: str
) -> None:
    ours = [rank[mode, variant] for rank in found]
    wanted = folder[1][variant]
    for result in ours:
        assert_same(result, wanted)
    start = AutoModelForCausalLM.from_pretrained(tiny)
    before = {f"policy.{name}": p.detach().numpy() for name, p in start.named_parameters()}
    policy = {n: t for n, t in wanted["parameters"].items() if n.startswith("policy.")}
    # Of a base under adapters nothing moves; B, which moves, starts from zeros.
    moved = [np.abs(t - before[n]).max() for n, t in policy.items() if n in before]
    if variant == "lora":
        assert max(moved) == 0
        moved = [np.abs(t).max() for n, t in policy.items() if ".lora_B." in n]
    assert max(moved) > 1e-2
    # Published by the first alone, and nothing but the parameters that are trained.
    assert ours[1]["published"] == {}
    sent = {_published_name(name): t for name, t in ours[0]["parameters"].items() if name in policy}
    if variant == "lora":
        sent = {name: t for name, t in sent.items() if ".lora_" in name}
    assert ours[0]["published"].keys() == sent.keys()
    assert all((ours[0]["published"][n] == t).all() for n, t in sent.items())
    # The same bits everywhere, or the ranks would drift apart.
    assert all((ours[1]["parameters"][n] == t).all() for n, t in ours[0]["parameters"].items())
    total = sum(tensor.size for tensor in ours[0]["parameters"].values())
    held = sum(result["held"] for result in ours)
    # Tensor parallelism leaves norms, some biases and the value head whole.
    most = {"fsdp2": 1.0, "tensor": 1.02}.get(mode, 2.0) * total
    assert total <= held <= most
    assert mode == "tensor" or held == most


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_publish_in_bfloat16_what_one_publishes(
    found: list[dict[Any, Any]], task: dict[str, Any], tiny: Path, mode: str
) -> None:
    """In buckets, with the canary of the rounded weights, and without touching the exact ones."""
    wanted = rounded_start(task, SINGLE, "none")
    first, second = (rank["rounded", mode] for rank in found)
    assert first["buckets"] == wanted["buckets"] > 3
    assert second["published"] == {}
    assert first["published"].keys() == wanted["published"].keys()
    assert all((first["published"][n] == a).all() for n, a in wanted["published"].items())
    assert first["canary"] == pytest.approx(wanted["canary"], abs=1e-6)
    exact = AutoModelForCausalLM.from_pretrained(tiny)
    for name, parameter in exact.named_parameters():
        for result in (wanted, first, second):
            assert (result["parameters"][name] == parameter.detach().numpy()).all(), name


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.parametrize(("sharding", "variant"), [("none", "shared"), ("fsdp2", "own")])
def test_a_checkpoint_goes_on_with_another_number_of_processes(
    folder: tuple[Path, Any],
    found: list[dict[Any, Any]],
    task: dict[str, Any],
    sharding: str,
    variant: str,
) -> None:
    place, alone = folder
    last = slice(2, STEPS)
    for rank in found:
        assert_same(rank["resumed", sharding, variant], alone[variant], last)
    resumed = Trained(task, variant, resume_from=str(place / f"two-{sharding}"))
    assert_same(resumed.steps(2, STEPS).result(), alone[variant], last)
    names = [p.relative_to(place / f"one-{variant}") for p in (place / f"one-{variant}").rglob("*")]
    assert all((place / f"two-{sharding}" / name).exists() for name in names)
    sizes = [
        (place / f"{kind}" / "policy" / "model.safetensors").stat().st_size
        for kind in (f"one-{variant}", f"two-{sharding}")
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.slow
@pytest.mark.parallel
def test_the_one_that_is_left_does_not_wait_for_ever(folder: tuple[Path, Any]) -> None:
    took, ending = ForkingPickler.loads((folder[0] / "ending.pkl").read_bytes())
    assert "Error" in ending or "PeerLost" in ending, ending
    assert took < TIMEOUT_S


@pytest.mark.slow
@pytest.mark.parallel
def test_a_process_that_comes_alone_says_so() -> None:
    store = meeting_place("127.0.0.1", 1.0)
    with pytest.raises(PeerLost, match="the learner's 2 processes did not find each other"):
        join(0, 2, store, gpu=False, timeout_s=1.0)


def test_everyone_gets_as_many_and_nothing_counts_twice() -> None:
    costs = [3.0, 9.0, 1.0, 7.0, 5.0]
    shares = [Ranks(rank, 2).deal(costs, float) for rank in range(2)]
    assert [len(share) for share in shares] == [3, 3]
    counted = sorted(item for share in shares for item, counts in share if counts)
    assert counted == sorted(costs)
    # Side by side: 9 and 7, then 3 and 5, then 1 and its repetition.
    assert [item for item, _ in shares[0]] == [9.0, 3.0, 1.0]
    assert shares[1] == [(7.0, True), (5.0, True), (1.0, False)]
    assert SINGLE.deal(costs, float) == [(cost, True) for cost in costs]


@pytest.mark.parametrize(
    ("learner", "words"),
    [
        ({"sharding": "fsdp2"}, "learner.processes to 2 or more"),
        ({"sharding": "fsdp2", "processes": 2, "compile": True}, "learner.compile"),
        ({"processes": 2, "gpus": 0.5}, "which NCCL refuses"),
    ],
)
def test_settings_that_cannot_work_are_named(learner: dict[str, Any], words: str) -> None:
    given = {
        "model": {"path": "m"},
        "data": {"prompts": "p"},
        "reward": {"sources": [{"type": "rules"}]},
        "learner": learner,
    }
    with pytest.raises(ValidationError, match=words):
        TrainConfig.model_validate(given)


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
