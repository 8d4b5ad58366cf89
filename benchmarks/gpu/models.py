"""Models with random weights and rollouts with random tokens: enough to measure and compare."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers

from benchmarks.gpu.scale import Shape
from cluster.contracts.rollout_table import SCHEMA
from cluster.measure.bench.corpus import corpus
from learner.models.tiny import train_tokenizer

WORDS = 280  # of the tokenizer: a model may know more ids than its tokenizer, as Qwen's do


def make_model(folder: Path, shape: Shape, *, dtype: str = "float32", context: int = 4096) -> Path:
    """A model directory, with the same weights every time."""
    tokenizer = train_tokenizer(corpus(0, 50), WORDS, folder)
    config = transformers.Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    # On a GPU: drawing 0.5B numbers took a core of an H100's host half a minute.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_prompts(path: Path, count: int = 64) -> Path:
    rows = ({"prompt": text} for text in corpus(1, count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rollouts(
    shape: Shape, step: int, groups: int, samples: int, tokens: int
) -> tuple[pa.Table, tuple[int, ...]]:
    """Rollouts of random tokens, sampled (so it says) by the newest version; half of a row is
    prompt. Log-probabilities near those of fresh weights."""
    rng = np.random.default_rng(step)
    ids = tuple(range(groups * step, groups * (step + 1)))
    none: dict[str, Any] = {key: [] for key in ("set_end", "set_count", "set_ids")}
    count = tokens // 2
    rows = [
        {
            "group_id": group,
            "sample": sample,
            "prompt_ids": rng.integers(5, shape.vocabulary, tokens - count).astype(np.int32),
            "token_ids": rng.integers(5, shape.vocabulary, count).astype(np.int32),
            "logprobs": rng.normal(-math.log(shape.vocabulary), 0.02, count).astype(np.float32),
            "span_version": [step],
            "span_end": [count],
            **none,
            "finish_reason": "stop",
            "score": float(rng.normal()),
            "score_parts": "{}",
        }
        for group in ids
        for sample in range(samples)
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA), ids
