"""Reward functions for sources of `type = "function"`: called with a batch, one number each.

``prompts`` and ``completions`` are lists (chat messages, or plain text when the prompts are text);
every metadata column of the prompt file comes as a further list by its name.
"""

from __future__ import annotations

from typing import Any


def about_thirty_words(completions: list[Any], **columns: list[Any]) -> list[float]:
    """1 for thirty words, falling evenly to 0 for none and for sixty. Fits any prompts."""
    return _about(30, completions)


def about_ten_words(completions: list[Any], **columns: list[Any]) -> list[float]:
    """1 for ten words, falling evenly to 0 for none and for twenty. Fits any prompts."""
    return _about(10, completions)


def _about(wanted: int, completions: list[Any]) -> list[float]:
    lengths = [len(text_of(completion).split()) for completion in completions]
    return [max(0.0, 1.0 - abs(n - wanted) / wanted) for n in lengths]


def names_the_product(
    completions: list[Any], product: list[str | None], **columns: list[Any]
) -> list[float]:
    """1 when the completion names what the column `product` of its row says, else 0."""
    return [
        1.0 if name is None or name in text_of(completion).lower() else 0.0
        for name, completion in zip(product, completions, strict=True)
    ]


def text_of(completion: Any) -> str:
    """A completion's text: of a chat, what the last message says."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
