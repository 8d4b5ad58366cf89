"""What a user gives a run, written into one host's folder: models, prompts, Python rewards with the
modules beside them, a learnt reward model, a chat template. And `accord` on host 1."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hosts import ROOT, Lab

PROMPTS = "".join(f'{{"prompt": "how long does the battery last {i}"}}\n' for i in range(32))

REWARD = """
from lengths import words
from wording import POLITE

def score(completions, **columns):
    return [min(words(c), 8) / 8 + any(word in str(c) for word in POLITE) for c in completions]
"""
LENGTHS = "def words(text):\n    return len(str(text).split())\n"
WORDING = "POLITE = ('please', 'thanks')\n"


def accord(lab: Lab, *words: str, folder: str = ".") -> subprocess.CompletedProcess[str]:
    """``folder``: below /host, in which the command is given."""
    command = (sys.executable, ROOT / "launch.py", *words)
    return lab.run(1, "env", "-C", folder, *command, timeout_s=280, ACCORD_NO_BOOTSTRAP="1")


def events(run: Path, *kinds: str) -> list[dict[str, Any]]:
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] in kinds]


def write_inputs(folder: Path, **shape: int) -> None:
    """model, reference, reward_model, prompts.jsonl, chat.jinja, rewards/. shape: of the models."""
    from learner.models.tiny import TEMPLATE, fresh_model, train_tokenizer

    shape = {"hidden": 32, "layers": 1, "heads": 1, "intermediate": 32, **shape}
    tokenizer = train_tokenizer(["how long does the battery last"] * 3, 320, folder / "model")
    fresh_model(tokenizer, folder / "model", **shape)
    fresh_model(tokenizer, folder / "reference", seed=1, **shape)
    write_reward_model(folder / "reward_model", folder / "model")
    (folder / "prompts.jsonl").write_text(PROMPTS)
    (folder / "chat.jinja").write_text(TEMPLATE)
    rewards = folder / "rewards"
    (rewards / "wording").mkdir(parents=True)
    (rewards / "polite.py").write_text(REWARD)
    (rewards / "lengths.py").write_text(LENGTHS)
    (rewards / "wording" / "__init__.py").write_text(WORDING)
    (rewards / "large.bin").write_bytes(bytes(1 << 20))  # lies there, and is nobody's business


def write_reward_model(folder: Path, policy: Path) -> None:
    """One whose head was drawn, on the policy's trunk, with the record that `accord` asks for."""
    import torch

    from cluster.contracts.config.base import ModelConfig
    from learner.models.heads import reward_scores
    from learner.models.load import load_sequence_classifier, load_tokenizer
    from learner.models.reward_artifact import (
        Golden,
        RewardArtifact,
        template_hash,
        tokenizer_fingerprint,
        write_artifact,
    )

    source = ModelConfig(path=str(policy))
    tokenizer = load_tokenizer(source)
    model = load_sequence_classifier(source, pad_token_id=tokenizer.pad_token_id)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(model.score.weight.shape, generator=generator))
    ids = [*tokenizer("how long", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        scored = reward_scores(model, torch.tensor([ids]), torch.ones(1, len(ids)).long())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_artifact(
        folder,
        RewardArtifact(
            tokenizer=tokenizer_fingerprint(tokenizer),
            template=template_hash(tokenizer),
            centre_mean=0.0,
            centre_std=1.0,
            centred_on="chosen",
            max_tokens=64,
            golden=(Golden(token_ids=tuple(ids), score=float(scored[0])),),
        ),
    )


REWARD_MODEL = """
[model]
path = "model"
chat_template = "chat.jinja"
[data]
path = "pairs.jsonl"
[fit]
max_steps = 4
[run]
dir = "/host/runs"
name = "rm"
[logging]
tensorboard = false
"""


def train_reward_model(lab: Lab, folder: Path) -> None:
    """In the place of the drawn one: by `accord reward-model` on host 1, which prefers polite
    completions."""
    asked = [f"how long does the battery last {i}" for i in range(64)]
    pairs = [{"prompt": p, "chosen": "long, thanks", "rejected": "no"} for p in asked]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "rm.toml").write_text(REWARD_MODEL)
    done = accord(lab, "reward-model", "rm.toml", folder=folder.name)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(folder / "reward_model")
    shutil.copytree(lab.disk(1) / "runs" / "rm" / "reward_model", folder / "reward_model")


CONFIG = """
[model]
path = "model"
chat_template = "chat.jinja"
[data]
prompts = "prompts.jsonl"
[[reward.sources]]
type = "function"
path = "rewards/polite.py:score"
[[reward.sources]]
type = "model"
path = "reward_model"
[reward]
resources = {{ reward = 1 }}
[algorithm]
advantage = "gae"
[algorithm.kl]
coef = 0.05
[batch]
prompts_per_step = 2
samples_per_prompt = 2
steps = {steps}
[rollout]
engine = "{engine}"
workers = 2
max_tokens = 8
resources = {{ rollout = 1 }}
[learner]
value_path = "reward_model"
reference_path = "reference"
resources = {{ learner = 1 }}
[run]
name = "{name}"
[checkpoint]
every = 1
[cluster]
address = "auto"
"""
