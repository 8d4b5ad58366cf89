"""A tiny policy, a fake publisher and hand-made rollouts for tests of the learner."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from cluster.contracts.config.algorithm import AlgorithmConfig, BatchConfig, StalenessConfig
from cluster.contracts.config.base import ModelConfig
from cluster.contracts.config.learner import LearnerConfig, WeightsConfig
from cluster.contracts.records import (
    Completion,
    Prompt,
    Rollout,
    RolloutGroup,
    Score,
    VersionSpan,
)
from cluster.contracts.rollout_table import to_table
from cluster.weights.update import Update
from learner.settings import LearnerSettings

VOCAB = 24
EOS = 1


def make_model(
    directory: Path,
    *,
    hidden: int = 32,
    layers: int = 2,
    vocab: int = VOCAB,
    heads: int = 2,
    keys: int = 1,
) -> Path:
    """A fresh Qwen2 with a word tokenizer, seeded."""
    torch.manual_seed(7)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=EOS,
        bos_token_id=None,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)
    words = {"<pad>": 0, "<eos>": EOS, **{f"w{i}": i for i in range(2, vocab)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(directory)
    return directory


class KeepingPublisher:
    """Copies what is published; `arrays` are those of the newest version."""

    on_device = False

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray[Any, Any]] = {}
        self.closed = False

    def open(self, version: int) -> Update:
        self._coming: dict[str, np.ndarray[Any, Any]] = {}
        return Update(version, "test", self)

    def put(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        self._coming |= {name: array.copy() for name, array in arrays.items()}

    def finish(self) -> None:
        self.arrays = self._coming

    def discard(self) -> None:
        """`arrays` are still those of the version before."""

    def retain(self, versions: Collection[int]) -> None:
        """Nothing is held."""

    def close(self) -> None:
        self.closed = True


def make_settings(
    path: Path,
    *,
    algorithm: Mapping[str, Any] | None = None,
    learner: Mapping[str, Any] | None = None,
    staleness: Mapping[str, Any] | None = None,
    batch: Mapping[str, Any] | None = None,
    **changes: Any,
) -> LearnerSettings:
    given: dict[str, Any] = {
        "model": ModelConfig(path=str(path)),
        "learner": LearnerConfig(**{"lr": 1e-3, "tokens_per_microbatch": 64, **(learner or {})}),
        "algorithm": AlgorithmConfig.model_validate(dict(algorithm or {})),
        "staleness": StalenessConfig.model_validate(dict(staleness or {})),
        "batch": BatchConfig(
            **{"prompts_per_step": 4, "samples_per_prompt": 2, "steps": 50, **(batch or {})}
        ),
        "weights": WeightsConfig(),
        "rollout_dtype": "float32",
        "temperature": 1.0,
        "max_tokens": 8,
        "seed": 3,
        "canary_prompt": (4, 5, 6),
    }
    return LearnerSettings(**{**given, **changes})


@torch.no_grad()
def sample_answers(
    model: Any, prompts: Sequence[Sequence[int]], max_tokens: int, seed: int, temperature: float
) -> list[tuple[list[int], list[float], bool]]:
    """(tokens, log-probabilities, ended) of each prompt, by whole forward passes over prompts of
    one length at a time.

    Written without anything of `learner`: it stands for the engine.
    """
    generator = torch.Generator().manual_seed(seed)
    answers: list[tuple[list[int], list[float], bool]] = [([], [], False)] * len(prompts)
    for length in sorted({len(prompt) for prompt in prompts}):
        rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([list(prompts[i]) for i in rows])
        chosen = torch.zeros(len(rows), 0)
        for _ in range(max_tokens):
            logp = (model(input_ids=ids).logits[:, -1] / temperature).log_softmax(-1)
            token = torch.multinomial(logp.exp(), 1, generator=generator)
            ids = torch.cat([ids, token], dim=1)
            chosen = torch.cat([chosen, logp.gather(1, token)], dim=1)
        for line, i in enumerate(rows):
            tokens = ids[line, length:].tolist()
            ended = EOS in tokens
            count = tokens.index(EOS) + 1 if ended else max_tokens
            answers[i] = (tokens[:count], chosen[line, :count].tolist(), ended)
    return answers


def make_groups(
    model: Any,
    *,
    first_group: int = 0,
    groups: int = 4,
    samples: int = 2,
    max_tokens: int = 8,
    seed: int = 0,
    version: int = 0,
    temperature: float = 1.0,
    score: Callable[[Sequence[int]], float] | None = None,
) -> list[RolloutGroup]:
    """Groups sampled from `model`; without `score`, scores are seeded noise."""
    noise = np.random.default_rng(seed)
    lengths = [2 + (first_group + g) % 3 for g in range(groups)]
    prompts = [[2 + (g + i) % (VOCAB - 2) for i in range(n)] for g, n in enumerate(lengths)]
    flat = [prompt for prompt in prompts for _ in range(samples)]
    answers = sample_answers(model, flat, max_tokens, seed, temperature)
    made = []
    for g, ids in enumerate(prompts):
        prompt = Prompt(id=f"p{g}", messages=(), token_ids=tuple(ids))
        rows = []
        for s in range(samples):
            tokens, logprobs, ended = answers[g * samples + s]
            value = float(noise.normal()) if score is None else score(tokens)
            rows.append((_rollout(prompt, s, tokens, logprobs, ended, version), _score(value)))
        made.append(RolloutGroup(group_id=first_group + g, samples=tuple(rows)))
    return made


def _score(value: float) -> Score:
    return Score(value=value, parts={"own": value}, scorer_version="test")


def _rollout(
    prompt: Prompt,
    sample: int,
    tokens: Sequence[int],
    logprobs: Sequence[float],
    ended: bool,
    version: int,
) -> Rollout:
    completion = Completion(
        token_ids=tuple(tokens),
        logprobs=tuple(logprobs),
        versions=(VersionSpan(version=version, start=0, end=len(tokens)),),
        finish_reason="stop" if ended else "length",
    )
    return Rollout(prompt=prompt, completion=completion, sample_index=sample, text="")


def table_of(groups: Sequence[RolloutGroup]) -> pa.Table:
    return to_table(groups)
