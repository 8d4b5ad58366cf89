"""The parts of a step's time, ``time/PART``. They add up to ``time/step``: each moment of a step
belongs to exactly one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

LearnerPart = Literal[
    "read", "experience", "forward", "backward", "optimizer", "metrics", "publish", "record"
]
"""Of the learner's own time."""
LEARNER_PARTS: tuple[LearnerPart, ...] = get_args(LearnerPart)

LoopPart = Literal["wait_batch", "ahead", "hand_over", "bookkeeping", "checkpoint", "redo"]
"""Of the time in which the learner does not compute the step. Ahead: it computes what of the step
is there already (``learner.stream_parts``)."""
LOOP_PARTS: tuple[LoopPart, ...] = get_args(LoopPart)


def unaccounted(numbers: Mapping[str, float]) -> float:
    """Share of ``time/step`` in a line of metrics that no part tells of."""
    parts = sum(numbers[f"time/{part}"] for part in (*LEARNER_PARTS, *LOOP_PARTS))
    return 1.0 - parts / numbers["time/step"]
