"""A very small policy, made once for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from learner.models.tiny import fresh_model, train_tokenizer

WORDS = [
    "good",
    "bad",
    "battery",
    "screen",
    "lasts",
    "hours",
    "broken",
    "great",
    "the",
    "a",
    "is",
    "how",
    "long",
    "does",
    "it",
    "my",
    "yes",
    "no",
]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a qwen2 with hidden 32 and two layers; read only."""
    folder = tmp_path_factory.mktemp("tiny")
    texts = [" ".join([word] * 5) for word in WORDS]
    tokenizer = train_tokenizer(texts, 320, folder / "tokenizer")
    return fresh_model(
        tokenizer, folder / "policy", hidden=32, layers=2, heads=2, intermediate=48, seed=1
    )
