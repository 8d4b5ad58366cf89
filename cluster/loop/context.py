"""What every part of the loop works with."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.contracts.protocols import Clock, Journal
from cluster.loop.activities import Activities
from cluster.loop.settings import LoopSettings
from cluster.loop.timeline import Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopContext:
    """``run``: where it is noted what happened."""

    settings: LoopSettings
    run: Journal
    clock: Clock
    timeline: Timeline
    activities: Activities = field(default_factory=Activities)
