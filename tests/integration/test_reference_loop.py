"""`accord train` without staleness equals a loop on one page in one process, bit for bit.

tests/reference_loop.py is that loop: no Ray, no gRPC, no Arrow, no controller, no learner, vLLM
through its own interface. Fifty steps of PPO and a few of GRPO give the same tokens, their
log-probabilities, rewards and advantages, and parameters with the same SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import learner.rl.learner
from cluster.assembly.replay import replay_run
from cluster.contracts.rollout_table import from_table
from cluster.runs.console import Reporter

pytest.importorskip("vllm", reason="vLLM has no build for this machine")
pytestmark = pytest.mark.slow

SEED, KL_COEF = 5, 0.2
STEPS = {"gae": 50, "grpo": 12}
LR = 3e-3
REWARD = '''
def reward(prompts, completions):
    """Different numbers for different answers, and a reason to go on."""
    texts = [turns[0]["content"] for turns in completions]
    return [sum(c in "aeiou" for c in text) / 3 + 0.07 * len(text) for text in texts]
'''
ALGORITHM = {
    "gae": f"kl = {{ coef = {KL_COEF} }}",
    "grpo": f'advantage = "grpo"\nkl = {{ coef = {KL_COEF}, place = "loss", estimator = "k2" }}',
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 with a head of its own: vLLM's own reload is right for such heads only."""
    import transformers

    from learner.models.tiny import train_tokenizer

    folder = tmp_path_factory.mktemp("untied")
    tokenizer = train_tokenizer(["how long does it last"] * 3, 270, folder)
    torch.manual_seed(1)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.1,
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def both(
    model: Path,
    world: Any,
    command_lines: Callable[[Path], Any],
    repo_root: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Path], dict[str, Any]]:
    """(run directory, what the reference did) by advantage; both at once, each on its own."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "reward.py").write_text(REWARD)
    prompts = folder / "prompts.jsonl"
    words = ("how", "long", "does it", "last", "a while")
    questions = [[{"role": "user", "content": word * (1 + i % 2)}] for i, word in enumerate(words)]
    prompts.write_text("".join(json.dumps({"prompt": turns}) + "\n" for turns in questions))
    jobs = [job(name, model, prompts, folder / "reward.py") for name in STEPS]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with (folder / "reference.log").open("wb") as log:
        reference = subprocess.Popen(
            [sys.executable, repo_root / "tests" / "reference_loop.py", "jobs.json", "out.json"],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo_root)},
            stdout=log,
            stderr=log,
        )
    line = command_lines(folder)
    try:
        runs = {name: train(line, name, world, model, prompts) for name in STEPS}
        assert reference.wait(180) == 0, (folder / "reference.log").read_text()[-4000:]
    finally:
        reference.kill()
        reference.wait(10)
        line.close()
    return runs, dict(zip(STEPS, json.loads((folder / "out.json").read_text()), strict=True))


def job(advantage: str, model: Path, prompts: Path, reward: Path) -> dict[str, Any]:
    from cluster.machine.torch_state import prepare_torch

    before = torch.get_float32_matmul_precision()
    precision = prepare_torch()
    torch.set_float32_matmul_precision(before)
    return {
        "advantage": advantage,
        "model": str(model),
        "prompts": str(prompts),
        "reward": str(reward),
        "precision": precision,
        "prompts_per_step": 2,
        "samples": 2,
        "out": str(prompts.parent / f"{advantage}-policy"),
        "seed": SEED,
        "steps": STEPS[advantage],
        "lr": LR,
        "kl_coef": KL_COEF,
    }


def train(line: Any, advantage: str, world: Any, model: Path, prompts: Path) -> Path:
    config = world.train_toml(
        line.folder / f"{advantage}.toml",
        'type = "function"\npath = "reward.py:reward"',
        run=f'dir = "{line.folder}/runs"\nname = "{advantage}"\nseed = {SEED}',
        model=f'path = "{model}"',
        data=f'prompts = "{prompts}"',
        batch=f"prompts_per_step = 2\nsamples_per_prompt = 2\nsteps = {STEPS[advantage]}",
        rollout='engine = "vllm"\nmax_tokens = 12\ntemperature = 0.8\nrequest_seeds = true',
        staleness="bound = 0",
        algorithm=ALGORITHM[advantage],
        learner=f"lr = {LR}\nepochs = 2\nminibatches = 2\nweight_decay = 0.01\n"
        'schedule = "linear"\nwarmup_steps = 3\ndeterministic = true\npacking = "padded"',
        # One thread everywhere, however many cores this machine has.
        cluster="object_store_mb = 80\npin_cores = false",
        logging="ray_metrics = false\ntensorboard = false",
    )
    command = line.run("train", config, timeout_s=180)
    assert command.process.returncode == 0, command.stderr
    return Path(line.folder) / "runs" / advantage


@pytest.mark.parametrize("advantage", STEPS)
def test_same_tokens_rewards_and_parameters(both: Any, advantage: str) -> None:
    run, expected = both[0][advantage], both[1][advantage]
    for step, wanted in enumerate(expected):
        table = pq.read_table(run / "rollouts" / f"step-{step:06d}.parquet")
        pairs = [pair for group in from_table(table) for pair in group.samples]
        answers = [rollout.completion for rollout, _ in pairs]
        assert [list(a.token_ids) for a in answers] == wanted["tokens"], f"tokens of step {step}"
        assert [s.value for _, s in pairs] == wanted["scores"], f"scores of step {step}"
        padded = [[*a.logprobs, *[0.0] * 12][: len(wanted["logps"][0])] for a in answers]
        assert padded == wanted["logps"], f"log-probabilities of step {step}"
    assert parameters(run / "policy") == parameters(run.parents[1] / f"{advantage}-policy")


@pytest.mark.parametrize("advantage", STEPS)
def test_same_advantages(both: Any, advantage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner does not keep them; its replay, verified bit for bit, computes them again."""
    run, expected = both[0][advantage], both[1][advantage]
    seen: list[Any] = []
    build = learner.rl.learner.build_experience

    def noting(*given: Any, **named: Any) -> Any:
        seen.append(build(*given, **named))
        return seen[-1]

    monkeypatch.setattr(learner.rl.learner, "build_experience", noting)
    try:
        replay_run(str(run), True, None, Reporter(quiet=True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(seen) == STEPS[advantage]
    for step, (experience, wanted) in enumerate(zip(seen, expected, strict=True)):
        assert experience.rewards.tolist() == wanted["rewards"], f"rewards of step {step}"
        assert experience.advantages.tolist() == wanted["advantages"], f"advantages of {step}"


def parameters(directory: Path) -> str:
    """SHA-256 over names and bytes of all parameters."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(directory / "model.safetensors").items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
