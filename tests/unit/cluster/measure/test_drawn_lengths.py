"""Completions of the model that counts down have the lengths they were promised to have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.measure.bench.drawn_lengths import count_down, lognormal_lengths
from learner.models.tiny import fresh_model, train_tokenizer

FIRST = 320


def test_lognormal_lengths_have_their_mean_and_variation() -> None:
    chances = torch.tensor(lognormal_lengths(20.0, 0.5, 400), dtype=torch.float64)
    lengths = torch.arange(2, 401)
    mean = (chances * lengths).sum()
    assert float(chances.sum()) == pytest.approx(1.0)
    assert float(mean) == pytest.approx(20.0, rel=0.01)
    deviation = (chances * (lengths - mean) ** 2).sum().sqrt()
    assert float(deviation / mean) == pytest.approx(0.5, rel=0.02)
    # The median of a lognormal is mean / sqrt(1 + variation^2): 17.9 here.
    assert int(lengths[(chances.cumsum(0) >= 0.5).nonzero()[0]]) == 18


def test_what_would_be_longer_has_the_longest_length() -> None:
    cut, whole = lognormal_lengths(20.0, 1.0, 30), lognormal_lengths(20.0, 1.0, 4000)
    assert len(cut) == 29
    assert cut[-1] == pytest.approx(sum(whole[28:]))


def test_the_model_draws_a_length_and_counts_down_to_the_end(tmp_path: Path) -> None:
    words = [f"{a}{b}" for a in "abcdefghijklmnop" for b in "aeiou"]
    folder = tmp_path / "model"
    tokenizer = train_tokenizer((" ".join(words[i:]) for i in range(60)), 400, folder)
    fresh_model(tokenizer, folder, hidden=256, layers=2, heads=4)
    chances = lognormal_lengths(12.0, 1.0, 64)
    count_down(folder, chances, "?", FIRST)

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    prompt = tokenizer("ba be?", add_special_tokens=False)["input_ids"]
    countdown = list(range(FIRST + len(chances) - 1, FIRST - 1, -1))
    with torch.no_grad():
        said = model(torch.tensor([prompt + countdown])).logits[0].softmax(-1)

    drawn = said[len(prompt) - 1]
    assert drawn[FIRST : FIRST + len(chances)].tolist() == pytest.approx(chances, abs=1e-4)
    follows = torch.tensor([*countdown[1:], tokenizer.eos_token_id])
    assert said[len(prompt) :].gather(1, follows[:, None]).min() > 0.9999

    with pytest.raises(ValueError, match="not one token"):
        count_down(folder, chances, "ba be")
