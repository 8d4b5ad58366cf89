"""The learner computes on a host that does not see the run directory: checkpoints and rollouts come
back whole, and a resume brings a checkpoint there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hosts import ROOT, Lab

pytestmark = pytest.mark.lab

PROMPTS = "".join(f'{{"prompt": "how long does it last {i}"}}\n' for i in range(16))
REWARD = (
    "def score(completions, **columns):\n    return [float(len(str(c))) for c in completions]\n"
)
CONFIG = """
[model]
path = "{model}"
[data]
prompts = "{inputs}/prompts.jsonl"
[[reward.sources]]
type = "function"
path = "{inputs}/reward.py:score"
[batch]
prompts_per_step = 2
samples_per_prompt = 2
steps = 2
[rollout]
engine = "transformers"
max_tokens = 4
[run]
name = "r"
[checkpoint]
every = 1
[logging]
ray_metrics = false
[cluster]
address = "{address}"
"""


def made_model(folder: Path) -> Path:
    from learner.models.tiny import fresh_model, train_tokenizer

    tokenizer = train_tokenizer(["how long does it last battery"] * 3, 320, folder)
    return fresh_model(tokenizer, folder, hidden=32, layers=1, heads=1, intermediate=32)


def prepared(lab: Lab, more: str = "") -> None:
    """train.toml on host 1, and what it names where all hosts see it; /host is of each alone."""
    inputs = lab.disk(1).parents[1] / "inputs"
    inputs.mkdir()
    (inputs / "prompts.jsonl").write_text(PROMPTS)
    (inputs / "reward.py").write_text(REWARD)
    text = CONFIG.format(model=made_model(inputs / "model"), inputs=inputs, address=lab.ray_address)
    (lab.disk(1) / "train.toml").write_text(text + more)


def accord(lab: Lab, *words: str) -> str:
    done = lab.run(1, sys.executable, ROOT / "launch.py", *words, ACCORD_NO_BOOTSTRAP="1")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_checkpoints_and_rollouts_of_a_learner_elsewhere(make_lab: Any) -> None:
    from transformers import AutoModelForCausalLM

    from cluster.runs.run import Run

    with make_lab(2) as lab:
        prepared(lab)
        lab.ray_head(cpus=0)  # so every role computes on host 2
        lab.ray_join(2, cpus=8)

        accord(lab, "train", "train.toml")
        run = Run(lab.disk(1) / "runs" / "r")
        found = run.checkpoints.newest_good()
        assert (found.state.step, found.passed_over) == (2, {})
        AutoModelForCausalLM.from_pretrained(run.path / "policy")
        rollouts = sorted(path.name for path in (run.path / "rollouts").iterdir())
        assert rollouts == ["step-000000.parquet", "step-000001.parquet"]
        assert not (lab.disk(2) / "runs").exists()

        said = accord(lab, "train", "--resume", "runs/r", "batch.steps=3")
        assert "resuming at step 2 of 3, prompt 4, version 2, from step-000002" in said
        assert run.checkpoints.newest_good().state.step == 3
        assert (run.path / "rollouts" / "step-000002.parquet").is_file()
        left = [path.name for path in (lab.disk(2).parent / "tmp").glob("accord-learner-*")]
        assert left == []


@pytest.mark.long
def test_processes_of_a_learner_on_hosts_with_disks_of_their_own(make_lab: Any) -> None:
    """The parts of two processes come from two hosts; then one process goes on, then two again."""
    from transformers import AutoModelForCausalLM

    from cluster.runs.run import Run

    two = ("learner.processes=2", "learner.sharding=fsdp2")
    with make_lab(3) as lab:
        prepared(lab, "[learner]\nresources = {learner = 1}\n")
        lab.ray_head(cpus=0)
        # Of each host one process of the learner at most.
        lab.ray_join_all(dict.fromkeys((2, 3), ('--resources={"learner": 1}',)))

        accord(lab, "train", "train.toml", *two)
        run = Run(lab.disk(1) / "runs" / "r")
        found = run.checkpoints.newest_good()
        assert (found.state.step, found.passed_over) == (2, {})
        parts = [path.name for path in (found.path / "state").glob("rank-*")]
        assert sorted(parts) == ["rank-00000.safetensors", "rank-00001.safetensors"]
        assert not (found.path / "policy_parts").exists()
        AutoModelForCausalLM.from_pretrained(run.path / "policy")
        for host in (2, 3):
            assert not (lab.disk(host) / "runs").exists()

        for step, changes in ((3, ("learner.processes=1", "learner.sharding=none")), (4, two)):
            said = accord(lab, "train", "--resume", "runs/r", f"batch.steps={step}", *changes)
            assert f"resuming at step {step - 1} of {step}, " in said
            assert run.checkpoints.newest_good().state.step == step
        for host in (2, 3):
            left = (lab.disk(host).parent / "tmp").glob("accord-learner-*")
            assert list(left) == []
