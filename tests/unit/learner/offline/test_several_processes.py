"""SFT, reward model and DPO on two processes learn what one learns, with whole and sharded weights.

This file is also the program that each of the two processes runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from cluster.contracts.config.offline import DpoConfig, RewardModelConfig, SftConfig
from learner.compute.microbatches import plan_microbatches
from learner.compute.ranks import SINGLE, Ranks, join, meeting_place
from learner.models.load import load_reward_model
from learner.offline.dpo import train_dpo
from learner.offline.reward import train_reward_model
from learner.offline.sft import train_sft
from learner.offline.shares import shares

pytestmark = pytest.mark.timeout(1500)
ROOT = Path(__file__).resolve().parents[4]
TIMEOUT_S = 120.0
# One plain gradient step: Adam would turn rounding of tiny gradients into whole steps.
FIT = {"lr": 0.1, "eps": 1.0, "rows_per_step": 12, "tokens_per_microbatch": 96, "max_steps": 4}
FIT |= {"eval_every": 2, "eval_fraction": 0.3, "max_tokens": 32, "schedule": "constant"}
LORA = {"rank": 4, "alpha": 16}
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {}),
    "sft-recomputed": ("sft", {"fit": {"gradient_checkpointing": True}}),
    "reward": ("reward", {"centre_coef": 0.01, "nll_coef": 0.01, "members": 3}),
    "ensemble": ("reward", {"members": 2, "share_trunk": False}),
    "dpo": ("dpo", {"kl_samples": 8}),
    "kto": ("dpo", {"loss": "kto", "kl_samples": 0}),
    "sft-lora": ("sft", {"lora": LORA}),
    "reward-lora": ("reward", {"lora": LORA, "members": 2}),
    "dpo-lora": ("dpo", {"lora": LORA, "kl_samples": 8}),
}
FEW = ("sft", "reward", "dpo-lora")
"""What is trained in the mode that only saves memory."""
RESULTS = {"policy", "reward_model", "adapter"}
MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "fsdp2": {"sharding": "fsdp2"},
    "saving": {
        "sharding": "fsdp2",
        "offload": ["optimizer"],
        "gradient_reduction": "step",
        "prefetch_layers": 2,
    },
}


def write_data(folder: Path) -> None:
    things = ("battery", "screen", "hours")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"how is the {things[i % 3]} {i}"}],
            "chosen": "great" + " yes" * (i % 4),
            "rejected": "broken" + " no" * (i % 3),
        }
        for i in range(60)
    ]
    text = "\n".join(json.dumps(row) for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")


def train(
    job: str, mode: str, task: dict[str, str], run: Path, ranks: Ranks, stop: int | None = None
) -> dict[str, Any]:
    """The numbers of every report and the evaluations of the whole; stopped after `stop` steps."""
    kind, changes = JOBS[job]
    several = {"processes": ranks.size, **(MODES[mode] if ranks.size > 1 else {})}
    tree = {
        "model": {"path": task["policy"]},
        "data": {"path": f"{task['folder']}/rows.jsonl"},
        **changes,
        "fit": {**FIT, **several, **changes.get("fit", {})},
    }
    kinds: dict[str, tuple[Any, Callable[..., Path]]] = {
        "sft": (SftConfig, train_sft),
        "reward": (RewardModelConfig, train_reward_model),
        "dpo": (DpoConfig, train_dpo),
    }
    config, function = kinds[kind]
    told: list[dict[str, float]] = []

    def on_step(step: int, part: float, numbers: dict[str, float]) -> None:
        told.append({n: v for n, v in numbers.items() if not n.startswith(("time/", "perf/"))})

    ends = (lambda: len(told) == stop) if ranks.first else (lambda: False)
    function(config.model_validate(tree), run, on_step, ends, ranks=ranks)
    return {"told": told}


def jobs_of(mode: str) -> list[str]:
    return [job for job in JOBS if mode != "saving" or job in FEW]


def work(rank: int, port: int, folder: Path) -> None:
    """One of the two processes: every job, then one that is stopped and one that goes on."""
    torch.set_num_threads(1)
    task = json.loads((folder / "task.json").read_text())
    ranks = join(rank, 2, ("127.0.0.1", port), gpu=False, timeout_s=TIMEOUT_S)
    found: dict[Any, Any] = {}
    for mode in MODES:
        for job in jobs_of(mode):
            found[mode, job] = train(job, mode, task, folder / f"{job}-{mode}", ranks)
        train("dpo", mode, task, folder / f"two-{mode}", ranks, stop=2)
        on = folder / f"one-{mode}"
        found["resumed", mode] = train("dpo", mode, task, on, ranks)
    (folder / f"found-{rank}.pkl").write_bytes(ForkingPickler.dumps(found))
    ranks.barrier()
    ranks.leave()


@pytest.fixture(scope="module")
def folder(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one process and two have written their runs."""
    place = tmp_path_factory.mktemp("several")
    write_data(place)
    task = {"policy": str(tiny_policy), "folder": str(place)}
    (place / "task.json").write_text(json.dumps(task), encoding="utf-8")
    for mode in MODES:
        train("dpo", "none", task, place / f"one-{mode}", SINGLE, stop=2)
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
        alone = {job: train(job, "none", task, place / job, SINGLE) for job in JOBS}
        codes = [process.wait(1200) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait(10)
    assert codes == [0, 0]
    for mode in MODES:
        train("dpo", "none", task, place / f"two-{mode}", SINGLE)
    (place / "alone.pkl").write_bytes(ForkingPickler.dumps(alone))
    return place


def found(folder: Path, name: str) -> Any:
    return ForkingPickler.loads((folder / f"{name}.pkl").read_bytes())


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Weights to 1e-6 of each tensor's scale, evaluations and figures to 1e-5."""
    files = [file.relative_to(theirs) for file in theirs.rglob("*.safetensors")]
    results = [file for file in files if file.parts[0] in RESULTS]
    assert results
    for file in results:
        got, wanted = load_file(ours / file), load_file(theirs / file)
        assert got.keys() == wanted.keys()
        for name, tensor in wanted.items():
            scale = np.abs(tensor).max() + 1e-3  # biases that started at 0
            assert np.abs(got[name] - tensor).max() < 1e-6 * scale, name
    for name in ("fit.json", "figures.json"):
        if (theirs / name).is_file():
            got, wanted = (flat(json.loads((run / name).read_text())) for run in (ours, theirs))
            assert got.keys() == wanted.keys()
            for key, value in wanted.items():
                same = got[key] == value or got[key] == pytest.approx(value, rel=1e-5, abs=1e-5)
                assert same or key == ".seconds", (name, key, got[key], value)


def flat(tree: Any, before: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict | list):
        return {before: tree}
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {k: v for key, part in pairs for k, v in flat(part, f"{before}.{key}").items()}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parallel
@pytest.mark.parametrize(("mode", "job"), [(mode, job) for mode in MODES for job in jobs_of(mode)])
def test_two_processes_learn_what_one_learns(folder: Path, mode: str, job: str) -> None:
    alone = found(folder, "alone")[job]["told"]
    assert len(alone) >= 4
    for rank in range(2):
        ours = found(folder, f"found-{rank}")[mode, job]["told"]
        if rank == 1:
            ours = ours[: len(alone)]
        for got, wanted in zip(ours, alone, strict=True):
            assert got.keys() == wanted.keys()
            for name, number in wanted.items():
                assert got[name] == pytest.approx(number, rel=1e-5, abs=1e-5), name
    assert_same_run(folder / f"{job}-{mode}", folder / job)
    if job == "reward":  # its golden scores hold, and so does what is made of the scores
        load_reward_model(folder / f"{job}-{mode}" / "reward_model")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parallel
@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_goes_on_with_another_number_of_processes(folder: Path, mode: str) -> None:
    for run in (f"one-{mode}", f"two-{mode}"):
        assert json.loads((folder / run / "fit.json").read_text())["finished"] is True
        assert_same_run(folder / run, folder / "dpo")
    told = found(folder, "found-0")["resumed", mode]["told"]
    assert told[0]["train/epoch"] == found(folder, "alone")["dpo"]["told"][2]["train/epoch"]


def test_shares_hold_every_row_once_and_cost_about_the_same() -> None:
    lengths = [(7 * i) % 23 + 3 for i in range(50)]
    assert [part for part, _ in shares(lengths, 60, SINGLE)] == plan_microbatches(lengths, 60)
    for size in (2, 3, 4):
        dealt = [shares(lengths, 60, Ranks(rank, size)) for rank in range(size)]
        assert len({len(share) for share in dealt}) == 1
        rows = sorted(i for share in dealt for part, counts in share if counts for i in part)
        assert rows == list(range(50))
        padded = [len(part) * lengths[part[0]] for share in dealt for part, _ in share]
        assert max(padded) <= 60
        costs = [sum(len(p) * lengths[p[0]] for p, c in share if c) for share in dealt]
        assert max(costs) < 1.25 * min(costs)
    # A step of one microbatch is cut, so that nobody only watches.
    assert [len(part) for part, _ in shares([5, 5, 5, 5], 4096, Ranks(1, 2))] == [2]


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
