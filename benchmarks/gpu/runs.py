"""Whole runs of `accord train` on a model with random weights, and what their metrics say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.models import make_model, write_prompts
from benchmarks.gpu.scale import Scale, Shape

ROOT = Path(__file__).resolve().parents[2]
# Random weights hardly ever end a completion: what varies is how many letters it has.
REWARD = """
def score(prompts, completions):
    return [len(text) / 100 for text in completions]
"""


def prepare(folder: Path, scale: Scale, shape: Shape) -> dict[str, Any]:
    """Files of a run; its settings by key, as `accord train` takes them on its command line."""
    dtype = "bfloat16" if scale.gpus else "float32"
    folder.mkdir(parents=True, exist_ok=True)
    model = make_model(folder / "model", shape, dtype=dtype)
    prompts = write_prompts(folder / "prompts.jsonl")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    config = folder / "run.toml"
    config.write_text(
        f'[model]\npath = "{model}"\ndtype = "{dtype}"\n'
        f'[data]\nprompts = "{prompts}"\nmax_prompt_tokens = 256\n'
        f'[[reward.sources]]\ntype = "function"\npath = "{folder / "reward.py"}:score"\n'
        f"[batch]\nprompts_per_step = {scale.run_prompts}\n"
        f"samples_per_prompt = {scale.run_samples}\n"
        f'[rollout]\nengine = "{scale.engine}"\nmax_tokens = {scale.run_tokens}\n'
        '[algorithm]\nadvantage = "grpo"\n[algorithm.kl]\ncoef = 0.0\n'
        "[learner]\nlr = 1e-6\n",
        encoding="utf-8",
    )
    return {"config": str(config), "dir": str(folder / "runs")}


def train(
    files: Mapping[str, Any], name: str, settings: Mapping[str, Any], timeout_s: float = 480.0
) -> Path:
    """`accord train`; its run directory. Raises CalledProcessError, TimeoutExpired."""
    words = [f"{key}={value}" for key, value in settings.items()]
    words += [f"run.dir={files['dir']}", f"run.name={name}"]
    command = ["train", str(files["config"]), *words]
    accord(command, timeout_s)
    return Path(files["dir"]) / name


def accord(words: list[str], timeout_s: float) -> str:
    """Standard output of a command; what it says goes to this process's own."""
    environment = {**os.environ, "ACCORD_NO_BOOTSTRAP": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *words], cwd=ROOT, env=environment, check=False,
        timeout=timeout_s, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    print(done.stdout, flush=True)
    done.check_returncode()
    return done.stdout


def keep_metrics(run: Path, out: Path, part: str) -> None:
    """Every step's metrics beside the part's record: the run's own folder is deleted."""
    shutil.copyfile(run / "metrics.jsonl", out / f"{part}-{run.name}.metrics.jsonl")


def steps(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for line in lines if "time/step" in (row := json.loads(line))]
