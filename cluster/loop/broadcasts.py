"""Sends each new version of the weights to the workers: one at a time, and only the newest."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from cluster.contracts.crash_points import passing
from cluster.contracts.errors import WeightsAway
from cluster.contracts.records import SwapReport, WeightManifest
from cluster.loop.context import LoopContext
from cluster.loop.staleness import AdmissionLedger


class Broadcasts:
    """``send``: brings every serving worker to a version. ``ended``: is told the reports of all
    workers and the seconds that the slowest took. Its end raises what the ledger holds.
    ``held_back``: whether workers are to keep the weights they have for now."""

    def __init__(
        self,
        send: Callable[[WeightManifest], Awaitable[list[SwapReport]]],
        ended: Callable[[Iterable[SwapReport], float], None],
        ledger: AdmissionLedger,
        held_back: Callable[[], bool],
        loop: LoopContext,
    ) -> None:
        self._send = send
        self._ended = ended
        self._ledger = ledger
        self._held_back = held_back
        self._activities = loop.activities
        self._clock = loop.clock
        self._timeline = loop.timeline
        self._next: WeightManifest | None = None  # only the newest is worth sending

    def queue(self, manifest: WeightManifest) -> None:
        """Send this one next. It replaces one that still waits."""
        self._next = manifest

    def forget(self) -> None:
        """What waits will not be there any more: the learner that holds it is lost."""
        self._next = None

    def start(self) -> None:
        idle = "broadcast" not in self._activities
        if self._next is not None and idle and not self._held_back():
            manifest, self._next = self._next, None
            self._activities.begin("broadcast", self._broadcast(manifest))

    async def _broadcast(self, manifest: WeightManifest) -> int:
        began = self._clock.now()
        reports = await self._send(manifest)
        ended = self._clock.now()
        self._ended(reports, ended - began)
        self._timeline.span("weights", f"version {manifest.version}", began, ended)
        passing("driver.after_broadcast")
        return manifest.version

    def after(self, task: asyncio.Task[Any]) -> None:
        """It has ended: more groups may be admitted."""
        # Without the learner that holds them, they are sent again by the next one.
        if not isinstance(task.exception(), WeightsAway):
            self._ledger.weights_held(task.result())
