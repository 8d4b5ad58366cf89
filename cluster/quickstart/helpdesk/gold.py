"""The gold judge as a reward function (`type = "function"`): for evaluation, never for training."""

from __future__ import annotations

from typing import Any

from cluster.quickstart.helpdesk.judge import gold_score


def gold(
    prompts: list[Any],
    completions: list[Any],
    *,
    kind: list[str],
    product: list[str],
    topic: list[str],
    **columns: list[Any],
) -> list[float]:
    """Gold scores of a batch; the lists are as long as each other, one entry an answer."""
    labels = zip(kind, product, topic, strict=True)
    return [
        gold_score({"kind": k, "product": p, "topic": t}, _text(completion)).score
        for (k, p, t), completion in zip(labels, completions, strict=True)
    ]


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
