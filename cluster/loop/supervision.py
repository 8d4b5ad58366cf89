"""What to do when a worker is lost or cannot start: pure decisions. ``recruiting`` applies them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.contracts.errors import MachineLost, WeightMismatch

WINDOW_S = 600.0
LONGEST_PAUSE_S = 30.0
FEWEST_OF_UNKNOWN = 3  # exceptions that nobody foresaw, of all workers, within the window


@dataclass(frozen=True, slots=True)
class Loss:
    """When a worker was lost or could not start (monotonic seconds), and whether it is charged:
    whether it counts towards ``rollout.max_restarts``."""

    at: float
    charged: bool = True


@dataclass(frozen=True, slots=True)
class Restart:
    after_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    reason: str


def decide(
    losses: Sequence[Loss],
    now: float,
    *,
    max_restarts: int,
    jitter: float = 0.0,
    window_s: float = WINDOW_S,
) -> Restart | GiveUp:
    """``losses``: those of this worker, the present one included. ``jitter``: from 0 to 1, drawn
    anew each time, so that workers lost together do not all come back in the same moment.

    Restarts at once the first time, then backs off 1, 2, 4, ... seconds (at most 30), of which the
    jitter takes up to a half. More than ``max_restarts`` charged losses within ``window_s`` mean
    that restarting does not help.
    """
    # Old losses are forgiven: a run of weeks meets a bad machine now and then.
    recent = [loss for loss in losses if now - loss.at <= window_s]
    charged = sum(loss.charged for loss in recent)
    if charged > max_restarts and recent[-1].charged:
        return GiveUp(f"lost {charged} times within {window_s:.0f} s")
    if len(recent) <= 1:
        return Restart(0.0)
    pause = min(LONGEST_PAUSE_S, 2.0 ** min(len(recent) - 2, 10))
    return Restart(pause * (1.0 - jitter / 2))


def is_charged(problem: BaseException, *, starting: bool, served_before: bool) -> bool:
    """Whether a loss is the worker's own doing.

    A machine that is gone and a reward service that is away are not. Nor is a replacement that
    cannot start: memory may not be free yet, or the cluster may have no room for it.
    """
    if isinstance(problem, WeightMismatch):
        return True
    if isinstance(problem, MachineLost) or getattr(problem, "fault", "worker") == "reward":
        return False
    return not (starting and served_before)
