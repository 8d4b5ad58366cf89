"""The simulated annotators as a function that `accord pipeline` calls (`label.annotate`)."""

from __future__ import annotations

import random
from typing import Any

from cluster.quickstart.helpdesk.annotators import ANNOTATORS, label_pair


def annotate(
    prompt: Any,
    a: str,
    b: str,
    *,
    seed: str,
    number: int,
    kind: str,
    product: str,
    topic: str,
    **columns: Any,
) -> dict[str, Any]:
    """The judgement of one of the five; ``number`` 0 to 4 are different ones, drawn by ``seed``."""
    annotator = random.Random(seed).sample(ANNOTATORS, len(ANNOTATORS))[number]
    about = {"kind": kind, "product": product, "topic": topic}
    label = label_pair(annotator, about, a, b, random.Random(f"{seed}/{number}"))
    return {
        "choice": label.choice,
        "annotator": annotator.name,
        "strength": float(label.strength),
        "duration_s": label.duration_s,
    }
