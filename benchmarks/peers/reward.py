"""The rewards of both sides: TRL imports them, Accord loads them as `reward.py:FUNCTION`."""

from __future__ import annotations

from typing import Any

VOWELS = frozenset("aeiouAEIOU")


def vowel_share(completions: list[str], **columns: Any) -> list[float]:
    """Share of vowels among an answer's characters, 0 to 1 (0 for an empty one)."""
    return [sum(c in VOWELS for c in text) / max(1, len(text)) for text in completions]


def brief_vowels(completions: list[str], **columns: Any) -> list[float]:
    """The share of vowels, less 0.001 a character, for answers that may end by themselves.

    Smoothed, so that a very short answer is neither punished nor lucky; without the price of
    length, answers would soon all be of the greatest length.
    """
    return [
        (sum(c in VOWELS for c in text) + 4) / (len(text) + 14) - 0.001 * len(text)
        for text in completions
    ]
