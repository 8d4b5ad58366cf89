"""Text for the benchmarks' tokenizers: sentences of made-up words, always the same."""

from __future__ import annotations

import random

ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "st", "tr", "pl")
VOWELS = ("a", "e", "i", "o", "u", "ai", "ee", "ou")
WORDS = 400


def corpus(seed: int, sentences: int) -> list[str]:
    """As many sentences of six to twelve words out of a vocabulary of 400."""
    rng = random.Random(seed)
    words = ["".join(_syllable(rng) for _ in range(rng.randint(1, 3))) for _ in range(WORDS)]
    return [" ".join(rng.choices(words, k=rng.randint(6, 12))) + "." for _ in range(sentences)]


def _syllable(rng: random.Random) -> str:
    return rng.choice(ONSETS) + rng.choice(VOWELS)
