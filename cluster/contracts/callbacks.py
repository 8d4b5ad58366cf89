"""What a run tells the user's own code while it goes on, and what that code may answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Literal

from cluster.contracts.samples import SampleInfo


class Stop(Enum):
    """The one thing a callback may answer."""

    STOP = "stop"


STOP = Stop.STOP
Answer = Literal[Stop.STOP] | None


@dataclass(frozen=True, slots=True)
class StepInfo:
    """A finished learner step. ``step`` counts from 1; ``steps``: how many the run will do, None
    where that is not known. ``metrics``: the row of metrics.jsonl."""

    step: int
    steps: int | None
    metrics: Mapping[str, float]


class Callback:
    """Base of a callback: override what is wanted. Each method may return ``STOP``.

    The methods are called in the process that started the run, one at a time. Training goes on
    meanwhile, but no new prompts are given out before the method returns: let it be short.
    An exception ends the run after a checkpoint and is then raised to the caller.
    """

    def on_step(self, info: StepInfo) -> Answer:
        """After each learner step."""
        return None

    def on_samples(self, samples: Sequence[SampleInfo]) -> Answer:
        """The completions a step was trained on, when they are on disk (a step or two later).
        Needs ``logging.save_rollouts``; offline training has none."""
        return None

    def on_checkpoint(self, path: Path, step: int) -> Answer:
        """After a checkpoint was written; ``path / "policy"`` is a model directory. Only in
        on-line training."""
        return None


AnyCallback = Callback | Callable[[StepInfo], Answer]
"""A plain function is called after each step."""
