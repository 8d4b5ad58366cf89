"""A reward function for `type = "function"` sources: called with a batch, returns one number each.

``prompts`` and ``completions`` are lists (chat messages, or plain text when the prompts are text);
every metadata column of the prompt file comes as a further list by its name.
"""

from __future__ import annotations

from typing import Any


def names_the_product(
    prompts: list[Any], completions: list[Any], product: list[str | None], **columns: list[Any]
) -> list[float]:
    """1 when the answer names the product the question is about (or there is none), else 0."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [
        1.0 if name is None or name in text.lower() else 0.0
        for name, text in zip(product, texts, strict=True)
    ]
