"""`accord init`: a commented config from a few answers."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.assembly.model_facts import read_model_facts
from cluster.contracts.config.base import AUTO, ModelConfig, Section
from cluster.contracts.config.commented import commented_toml
from cluster.contracts.config.file import check_config
from cluster.contracts.config.offline import DpoConfig, RewardModelConfig, SftConfig
from cluster.contracts.config.presets import algorithm_settings
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import UserError

Algorithm = Literal["grpo", "ppo", "sft", "dpo", "reward-model"]

CONFIGS: Mapping[Algorithm, type[Section]] = {
    "grpo": TrainConfig,
    "ppo": TrainConfig,
    "sft": SftConfig,
    "dpo": DpoConfig,
    "reward-model": RewardModelConfig,
}
SMALL = 50_000_000  # parameters
LEARNING_RATES: Mapping[Algorithm, tuple[float, float]] = {  # below that size, and from it
    "grpo": (2e-4, 1e-6),
    "ppo": (2e-4, 1e-6),
    "sft": (1e-3, 1e-5),
    "dpo": (5e-5, 1e-6),
    "reward-model": (3e-4, 1e-5),
}
STARTER = '''\
"""The reward: one number per completion. A larger number is a better completion."""

WANTED_WORDS = 30


def score(prompts, completions, **columns):
    """1 for thirty words, falling evenly to 0 for none and for sixty. Replace it by your own.

    ``completions`` are texts, or lists of messages when the prompts are messages. Every other
    column of the prompt file arrives by its name in ``columns``.
    """
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    lengths = [len(text.split()) for text in texts]
    return [max(0.0, 1.0 - abs(n - WANTED_WORDS) / WANTED_WORDS) for n in lengths]
'''


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """reward: FILE.py:FUNCTION, a reward model's directory, HOST:PORT, or empty for a starter file.

    data: prompts for grpo and ppo, rows or pairs for the others. steps: of the learner; for the
    others the passes over the data are fixed instead.
    """

    algorithm: Algorithm
    model: str
    data: str
    reward: str = ""
    steps: int = 100


def command_of(algorithm: Algorithm) -> str:
    return f"accord {'train' if CONFIGS[algorithm] is TrainConfig else algorithm}"


def write_new_config(target: Path, answers: Answers) -> list[Path]:
    """Write the config, and a reward function to start from when none was named; what was written.

    target: a *.toml file, or a directory for ALGORITHM.toml. Raises UserError when a file is there
    already: nothing is ever overwritten.
    """
    file = target if target.suffix == ".toml" else target / f"{answers.algorithm}.toml"
    starter = file.with_name("reward.py")
    needs_starter = CONFIGS[answers.algorithm] is TrainConfig and not answers.reward
    files = [file, starter] if needs_starter else [file]
    for path in files:
        if path.exists():
            raise UserError(
                "is there already",
                where=str(path),
                fix="give another name, such as `accord init other.toml`"
                if path == file
                else "remove it, or give it as the reward: --reward reward.py:FUNCTION",
            )
    reward = f"{os.path.relpath(starter)}:score" if needs_starter else answers.reward
    text = config_text(answers, reward, file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if needs_starter:
            starter.write_text(STARTER, encoding="utf-8")
        file.write_text(text, encoding="utf-8")
    except OSError as problem:
        raise UserError(
            f"cannot be written: {problem.strerror}", where=str(file), fix="give another place"
        ) from None
    return files


def config_text(answers: Answers, reward: str, file: Path) -> str:
    """The config as TOML. Raises UserError when the answers make no valid one."""
    config = CONFIGS[answers.algorithm]
    values = _values(answers, reward)
    check_config(config, values, where="accord init")
    command = command_of(answers.algorithm)
    lines = [
        f"# {answers.algorithm} on {answers.model}, written by `accord init`.",
        f"# Start it:  {command} {file}",
    ]
    if config is TrainConfig:
        lines.append(f"# Check it first:  accord plan {file}  (prints every value in force, too)")
    lines += ["# Every key that there is: docs/configuration.md", ""]
    return "\n".join(lines) + "\n" + commented_toml(config, values)


def _values(answers: Answers, reward: str) -> dict[str, Any]:
    facts = read_model_facts(ModelConfig(path=answers.model))
    small, large = LEARNING_RATES[answers.algorithm]
    lr = small if facts is not None and facts.parameters < SMALL else large
    model = {"path": answers.model}
    if answers.algorithm in ("grpo", "ppo"):
        return {
            "model": model,
            "data": {"prompts": answers.data, "max_prompt_tokens": 512},
            "reward": {"sources": [reward_source(reward)]},
            "batch": {"prompts_per_step": 16, "samples_per_prompt": 8, "steps": answers.steps},
            "rollout": {"max_tokens": AUTO, "temperature": 1.0, "workers": 1},
            "staleness": {"bound": 2},
            "algorithm": _algorithm(answers.algorithm),
            "learner": {"lr": lr},
        }
    fit = {"epochs": 1, "lr": lr, "rows_per_step": 32, "max_tokens": 512}
    own = {"beta": 0.1} if answers.algorithm == "dpo" else {}
    return {**own, "model": model, "data": {"path": answers.data}, "fit": fit}


def _algorithm(algorithm: Algorithm) -> dict[str, Any]:
    settings = algorithm_settings(algorithm)
    return {**settings, "kl": {"coef": 0.05, "place": "reward", **settings.get("kl", {})}}


def reward_source(reward: str) -> dict[str, Any]:
    """The kind of source that a word names. Raises UserError when it names none."""
    file, _, function = reward.rpartition(":")
    if file.endswith(".py") and function.isidentifier():
        return {"type": "function", "path": reward}
    if reward.endswith(".py"):
        raise UserError(
            "names no function",
            where=f"--reward {reward}",
            fix=f"add its name: --reward {reward}:FUNCTION",
        )
    if Path(reward).is_dir():
        return {"type": "model", "path": reward}
    if re.fullmatch(r"[\w.-]+:\d+", reward):
        return {"type": "grpc", "address": reward}
    raise UserError(
        "is no reward",
        where=f"--reward {reward}",
        fix="give FILE.py:FUNCTION, the directory of a reward model, or HOST:PORT of a service",
    )
