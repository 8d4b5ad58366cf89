"""One size and dtype of the learner benchmark, in its own process."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from cluster.contracts.config.algorithm import AlgorithmConfig, BatchConfig, StalenessConfig
from cluster.contracts.config.base import ModelConfig
from cluster.contracts.config.learner import LearnerConfig, WeightsConfig
from cluster.contracts.metrics import values
from cluster.contracts.records import StepInput
from cluster.contracts.rollout_table import SCHEMA
from cluster.measure.bench.children import answer
from cluster.measure.bench.learner import MAX_TOKENS, PROMPTS, SAMPLES
from cluster.weights.update import Update
from learner.models.tiny import fresh_model
from learner.rl.learner import PPOLearner
from learner.rl.microbatch import Microbatch, Microbatches
from learner.rl.own_rows import OwnRows
from learner.rl.rollouts import read_batch
from learner.settings import LearnerSettings

LR = 1e-4
KINDS: dict[str, dict[str, Any]] = {
    "grpo": {"advantage": "grpo", "kl": {"coef": 0.0}},
    "ppo": {},
}
PHASES = ("experience", "forward", "backward", "publish")


class Bare:
    """What any training loop has to do, on the learner's microbatches."""

    def __init__(self, model: Path, dtype: str) -> None:
        self.policy = transformers.AutoModelForCausalLM.from_pretrained(
            model, attn_implementation="eager"
        )
        self.cast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=LR, fused=True)

    def step(self, micros: list[Microbatch]) -> None:
        total = sum(len(micro.labels) for micro in micros)
        for micro in micros:
            mask = micro.attention_mask
            with self.cast:
                hidden = self.policy.model(
                    input_ids=micro.input_ids,
                    attention_mask=mask,
                    position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                    use_cache=False,
                ).last_hidden_state
            chosen = hidden.reshape(-1, hidden.shape[-1])[micro.sources].float()
            logits = torch.nn.functional.linear(chosen, self.policy.lm_head.weight)
            loss = torch.nn.functional.cross_entropy(logits, micro.labels, reduction="sum")
            (loss / total).backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class CopyingPublisher:
    """Copies and checksums, as every transport does; nobody reads it."""

    on_device = False

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def open(self, version: int) -> Update:
        return Update(version, "none", self)

    def put(self, arrays: Mapping[str, Any]) -> None:
        self.kept |= {name: array.copy() for name, array in arrays.items()}

    def finish(self) -> None:
        """Nowhere."""

    def discard(self) -> None:
        """Nothing is held."""

    def retain(self, versions: Collection[int]) -> None:
        """Nothing is held."""

    def close(self) -> None:
        return


def measured(task: dict[str, Any]) -> dict[str, Any]:
    """The rows of one case; `task`: shape, dtype, steps, padded (measure padded rows as well)."""
    with tempfile.TemporaryDirectory() as folder:
        model, dtype = make_model(Path(folder), task["shape"]), task["dtype"]
        learners = {kind: _learner(model, dtype, KINDS[kind]) for kind in KINDS}
        if task["padded"]:
            learners["grpo padded"] = _learner(model, dtype, KINDS["grpo"], packing="padded")
        bare = Bare(model, dtype)
    seconds: dict[str, list[float]] = {kind: [] for kind in ("bare", *learners)}
    phases: dict[str, list[dict[str, float]]] = {kind: [] for kind in learners}
    tokens = []
    for step in range(task["steps"] + 1):  # the first one warms up
        table, groups = random_rollouts(task["shape"][0], step)
        batch = read_batch([table], groups, SAMPLES)
        tokens.append((int(batch.lengths.sum()), int(batch.response_ids.lengths.sum())))
        micros = Microbatches(OwnRows.all_of(batch), 2048, "cpu").of(range(len(batch)))
        given = StepInput(step=step, group_ids=groups, payloads=(table,))
        turns: list[tuple[str, Callable[[], Any]]] = [("bare", partial(bare.step, micros))]
        turns += [(kind, partial(at.step, given)) for kind, at in learners.items()]
        for kind, run in turns if step % 2 else reversed(turns):
            began = time.process_time()
            outcome = run()
            seconds[kind].append(time.process_time() - began)
            if kind in phases:
                phases[kind].append(values(outcome.metrics))
    return _summary(seconds, phases, tokens)


def _summary(
    seconds: dict[str, list[float]],
    phases: dict[str, list[dict[str, float]]],
    tokens: list[tuple[int, int]],
) -> dict[str, Any]:
    rows = []
    for kind, spent in seconds.items():
        row: dict[str, Any] = {"kind": kind}
        for name, column in (("tokens per CPU-s", 0), ("answer tokens per CPU-s", 1)):
            rates = [t[column] / s for t, s in zip(tokens[1:], spent[1:], strict=True)]
            row[name] = round(statistics.median(rates))
        for phase in PHASES:
            shares = [p[f"time/{phase}"] / p["time/step"] for p in phases.get(kind, [])[1:]]
            row[phase] = f"{statistics.median(shares):.1%}" if shares else ""
        # Of the CPU time, like the rest: what others took is no idleness of this process.
        mfus = [
            p["perf/mfu"] * p["time/step"] / s
            for p, s in zip(phases.get(kind, [])[1:], spent[1:], strict=False)
        ]
        row["MFU"] = f"{statistics.median(mfus):.1%}" if mfus else ""
        rows.append(row)
    found: dict[str, Any] = {"rows": rows, "efficiency": _ratio(seconds, "bare", "grpo")}
    if "grpo padded" in seconds:
        found["packed_over_padded"] = _ratio(seconds, "grpo padded", "grpo")
    return found


def _ratio(seconds: dict[str, list[float]], above: str, below: str) -> float:
    pairs = zip(seconds[above][1:], seconds[below][1:], strict=True)
    return statistics.median(a / b for a, b in pairs)


def _learner(model: Path, dtype: str, algorithm: dict[str, Any], **learner: Any) -> PPOLearner:
    settings = learner_settings(model, dtype, algorithm, **learner)
    made = PPOLearner(settings, CopyingPublisher(), threads=1)
    made.start()
    return made


def learner_settings(
    model: Path, dtype: str, algorithm: dict[str, Any], **learner: Any
) -> LearnerSettings:
    return LearnerSettings(
        model=ModelConfig.model_validate({"path": str(model), "dtype": dtype}),
        learner=LearnerConfig.model_validate({"lr": LR, **learner}),
        algorithm=AlgorithmConfig.model_validate(algorithm),
        staleness=StalenessConfig(),
        batch=BatchConfig(prompts_per_step=PROMPTS, samples_per_prompt=SAMPLES),
        weights=WeightsConfig(),
        rollout_dtype="float32",
        temperature=1.0,
        max_tokens=MAX_TOKENS,
        seed=0,
        canary_prompt=(4, 5, 6),
    )


def make_model(folder: Path, shape: list[int]) -> Path:
    vocabulary, hidden, layers, heads, intermediate = shape
    words = {"<pad>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, vocabulary)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<pad>"
    )
    return fresh_model(
        tokenizer,
        folder / "model",
        hidden=hidden,
        layers=layers,
        heads=heads,
        intermediate=intermediate,
    )


def random_rollouts(vocabulary: int, step: int) -> tuple[pa.Table, tuple[int, ...]]:
    """Rollouts of random tokens; log-probabilities near those of fresh weights."""
    rng = np.random.default_rng(step)
    groups = tuple(range(PROMPTS * step, PROMPTS * (step + 1)))
    rows = []
    for group in groups:
        prompt = rng.integers(2, vocabulary, rng.integers(8, 25)).astype(np.int32)
        for sample in range(SAMPLES):
            count = int(np.clip(rng.normal(48, 16), 8, MAX_TOKENS))
            logp = rng.normal(-math.log(vocabulary), 0.02, count).astype(np.float32)
            rows.append(
                {
                    "group_id": group,
                    "sample": sample,
                    "prompt_ids": prompt,
                    "token_ids": rng.integers(2, vocabulary, count).astype(np.int32),
                    "logprobs": logp,
                    "span_version": [step],
                    "span_end": [count],
                    **{key: [] for key in ("set_end", "set_count", "set_ids")},  # no limits
                    "finish_reason": "stop",
                    "score": float(rng.normal()),
                    "score_parts": "{}",
                }
            )
    return pa.Table.from_pylist(rows, schema=SCHEMA), groups


if __name__ == "__main__":
    answer(measured)
