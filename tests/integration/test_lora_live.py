"""LoRA with the real vLLM: a run, resumed and replayed; its adapter in the libraries people use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM has no build for this machine")
pytestmark = [pytest.mark.slow, pytest.mark.long]

ROOT = Path(__file__).resolve().parents[2]
PARITY = 1e-4  # nats


@pytest.fixture(scope="module")
def line(command_lines: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = command_lines(tmp_path_factory.mktemp("lora"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def run(world: Any, line: Any) -> Path:
    """Six steps, and after a resume six more; two workers."""
    config = world.train_toml(
        line.folder / "c.toml",
        'type = "rules"\nmax_words = 3\nrepetition = true',
        batch="prompts_per_step = 2\nsamples_per_prompt = 3\nsteps = 6",
        rollout='engine = "vllm"\nmax_tokens = 24\nworkers = 2',
        learner="lr = 3e-2\nminibatches = 2",
        lora="rank = 8",
        checkpoint="every = 3",
        logging="ray_metrics = false\ntensorboard = false",
    )
    command = line.run("train", config, timeout_s=400)
    assert command.process.returncode == 0, command.stderr
    run = Path(line.folder) / "runs" / "r"
    command = line.run("train", "--resume", run, "batch.steps=12", timeout_s=400)
    assert command.process.returncode == 0, command.stderr
    return run


def test_every_push_computes_what_the_learner_computes(run: Path) -> None:
    rows = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted({row["step"] for row in rows}) == list(range(1, 13))
    name = "weight_sync/canary_logp_diff"  # of the pushes that were taken since the last row
    found = [row[name] for row in rows if name in row]
    assert len(found) > 6
    assert max(found) <= PARITY
    assert max(abs(row["objective/kl"]) for row in rows) > 1e-3  # else nothing was learnt
    newest = run / "checkpoints" / "step-000012"
    assert (newest / "adapter" / "adapter_config.json").is_file()
    assert not (newest / "policy").exists()


def test_it_replays_bit_for_bit(line: Any, run: Path) -> None:
    command = line.run("replay", run, "--verify", timeout_s=200)
    assert command.process.returncode == 0, command.stderr
    assert "the weights after every step and the policy equal the run's" in command.stdout


def test_the_adapter_loads_in_peft_transformers_and_vllm(run: Path) -> None:
    script = ROOT / "tests" / "integration" / "lora_libraries.py"
    given = [sys.executable, str(script), str(run)]
    done = subprocess.run(
        given, capture_output=True, text=True, timeout=400, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("moved") > 1e-3
    assert found.keys() == {"peft", "transformers", "vllm"}
    assert max(found.values()) <= PARITY, found
