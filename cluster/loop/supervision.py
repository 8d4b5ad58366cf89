"""What to do when a worker is lost: pure decisions from its history. ``pool`` applies them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Restart:
    after_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    reason: str


def decide(
    losses: Sequence[float], now: float, *, max_restarts: int, window_s: float = 600.0
) -> Restart | GiveUp:
    """``losses``: times (monotonic seconds) this worker was lost, the present loss included.

    Restarts at once the first time, then backs off 1, 2, 4, ... seconds (at most 30). More than
    ``max_restarts`` losses within ``window_s`` means that restarting does not help.
    """
    # Old losses are forgiven: a run of weeks meets a bad machine now and then.
    recent = [t for t in losses if now - t <= window_s]
    if len(recent) > max_restarts:
        return GiveUp(f"lost {len(recent)} times within {window_s:.0f} s")
    return Restart(0.0 if len(recent) <= 1 else min(30.0, 2.0 ** (len(recent) - 2)))
