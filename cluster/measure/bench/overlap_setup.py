"""The workload C5: a model of 4.8 million weights, prompts, a cheap reward, and the run's config.

Made here from a seed, without a model hub. One step is 128 answers (16 prompts x 8) of 48 tokens to
prompts of 16; one epoch, a value head on the policy's trunk, a reference model. With a tail, the
lengths are lognormal instead: mean 48, coefficient of variation 1, cut at 384.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.contracts.config.algorithm import AlgorithmConfig, BatchConfig, StalenessConfig
from cluster.contracts.config.base import ClusterConfig, DType, ModelConfig, RunConfig
from cluster.contracts.config.learner import CheckpointConfig, LearnerConfig
from cluster.contracts.config.reward import FunctionSource, RewardConfig
from cluster.contracts.config.rollout import DataConfig, RolloutConfig
from cluster.contracts.config.train import TrainConfig
from cluster.measure.bench.drawn_lengths import count_down, lognormal_lengths

VOCABULARY, HIDDEN, LAYERS, HEADS, INTERMEDIATE = 4096, 256, 5, 4, 640
PROMPT_TOKENS, ANSWER_TOKENS = 16, 48
LONGEST = 8 * ANSWER_TOKENS  # answer where there is a tail
VARIATION = 1.0  # of the lengths there
TAIL_PROMPT_END = "?"  # of each prompt there: a token from which the model draws a length
WARM_UP = 4  # steps before the window: first batches compile kernels and fill the pipeline
BOUND = 2

Mode = Literal["async", "sync", "colocated"]
REWARD = '''"""Score of an answer: how much of it is lower-case letters."""


def score(prompts: list[str], completions: list[str]) -> list[float]:
    return [sum(c.islower() for c in text) / (len(text) + 1) for text in completions]
'''


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Where the files are and how large the run is. ``window``: steps that are measured;
    ``running``: answers decoded at once, half of those of a step; ``tail``: lengths are spread."""

    folder: str
    dtype: DType = "bfloat16"
    prompts_per_step: int = 16
    samples_per_prompt: int = 8
    running: int = 64
    window: int = 20
    tail: bool = False

    @property
    def answers(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    def steps(self, mode: Mode) -> int:
        """Of the whole run: warm-up, window and, where generation runs ahead, the last steps, in
        which there is nothing more to generate."""
        return WARM_UP + self.window + (BOUND + 1 if mode == "async" else 0)


def make_files(folder: Path, *, tail: bool) -> None:
    """Model, tokenizer, prompts and reward function under ``folder``."""
    from learner.models.tiny import fresh_model, train_tokenizer

    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(3, 9))) for _ in range(3000)]
    model = folder / "model"
    tokenizer = train_tokenizer(
        (" ".join(rng.choices(words, k=12)) for _ in range(2000)), VOCABULARY, model
    )
    fresh_model(
        tokenizer, model, hidden=HIDDEN, layers=LAYERS, heads=HEADS, intermediate=INTERMEDIATE
    )
    if tail:
        count_down(model, lognormal_lengths(ANSWER_TOKENS, VARIATION, LONGEST), TAIL_PROMPT_END)
    end = TAIL_PROMPT_END if tail else ""
    prompts = [{"prompt": _prompt(rng, words, tokenizer) + end} for _ in range(512)]
    lines = "".join(json.dumps(row) + "\n" for row in prompts)
    (folder / "prompts.jsonl").write_text(lines, encoding="utf-8")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")


def _prompt(rng: random.Random, words: list[str], tokenizer: Any) -> str:
    """As many words as make PROMPT_TOKENS tokens with the chat template around them."""
    text = rng.choice(words)
    while True:
        longer = f"{text} {rng.choice(words)}"
        messages = [{"role": "user", "content": longer}]
        asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if len(tokenizer(asked, add_special_tokens=False)["input_ids"]) > PROMPT_TOKENS:
            return text
        text = longer


def train_config(workload: Workload, mode: Mode, name: str) -> TrainConfig:
    """What `accord train` is given. ``colocated`` differs from ``sync`` in its two workers, and in
    the cores it is run on."""
    folder = Path(workload.folder)
    return TrainConfig(
        run=RunConfig(name=name, dir=str(folder / "runs")),
        model=ModelConfig(path=str(folder / "model"), dtype=workload.dtype),
        data=DataConfig(prompts=str(folder / "prompts.jsonl"), max_prompt_tokens=PROMPT_TOKENS),
        reward=RewardConfig(sources=[FunctionSource(path=str(folder / "reward.py") + ":score")]),
        batch=BatchConfig(
            prompts_per_step=workload.prompts_per_step,
            samples_per_prompt=workload.samples_per_prompt,
            steps=workload.steps(mode),
        ),
        rollout=RolloutConfig(
            engine="vllm",
            dtype=workload.dtype,
            workers=2 if mode == "colocated" else 1,
            max_tokens=LONGEST if workload.tail else ANSWER_TOKENS,
            max_running=workload.running,
            kv_cache_mb=64,  # set, not chosen: stored results were measured with it
            gpus=0,
            kv_on_swap="keep",  # computing caches again after a swap would be more generation
        ),
        staleness=StalenessConfig(bound=BOUND if mode == "async" else 0),
        algorithm=AlgorithmConfig(),
        learner=LearnerConfig(lr=1e-5, value_model="shared", gpus=0, cpus=1),
        checkpoint=CheckpointConfig(every=10_000),
        cluster=ClusterConfig(pin_cores=True),
    )
