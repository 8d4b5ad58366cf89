"""The weights that every worker is to hold, and how a worker gets them.

A worker that joins loads them while training goes on and may have to load again, because they have
moved on meanwhile. One that loads more slowly than steps are trained would never serve. So after
``MISSES`` loads in vain the next broadcast waits for it, as it waits for the slowest of those that
serve: then weights move on no further, and its load is the last.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from cluster.contracts.deadlines import within
from cluster.contracts.errors import AccordError, Retryable, WeightMismatch, WeightsAway
from cluster.contracts.protocols import Clock
from cluster.contracts.records import SwapReport, WeightManifest
from cluster.loop.members import Member

SOURCE_S = 5.0  # for the learner to say that it is there
LOOK_S = 0.5
MISSES = 2


async def _answers() -> None:
    """A source of weights that is always there."""


class CurrentWeights:
    def __init__(self, timeout_s: float, clock: Clock, event: Callable[..., None]) -> None:
        """``timeout_s``: for one worker to load one version."""
        self._timeout_s = timeout_s
        self._clock = clock
        self._event = event
        self._awaited: dict[int, asyncio.Event] = {}  # by index; set when it is to wait no longer
        self._lost: WeightManifest | None = None  # the newest whose learner is gone
        self.manifest: WeightManifest | None = None
        self.first: asyncio.Future[WeightManifest] | None = None  # from the learner's start
        self.source: Callable[[], Awaitable[None]] = _answers  # whether the learner is there

    def lost(self) -> None:
        """Their learner is gone, and what it held with it. The next one may answer already, long
        before it has published them anew."""
        self._lost = self.manifest

    async def load(self, member: Member, manifest: WeightManifest) -> SwapReport:
        """Raises WeightsAway where the learner is gone, Retryable or WeightMismatch where the
        worker is not on this version."""
        async with member.swap:  # a joiner may still be loading when the next broadcast comes
            try:
                report = await within(self._timeout_s, member.handle.load_weights(manifest))
            except TimeoutError:
                raise Retryable(
                    f"not on version {manifest.version} within {self._timeout_s:.0f} s"
                ) from None
            except Retryable as problem:
                await self._require_source(manifest, problem)
                raise
            except WeightMismatch:
                # Here, where it is known which version it was: a newer one may be on its way.
                member.mismatches[manifest.version] += 1
                raise
            member.version = report.version
            return report

    async def join(self, member: Member) -> None:
        """Load until the member holds the current weights. It does not serve yet, so that a
        broadcast passes it over; it must not miss that."""
        if self.manifest is None:
            assert self.first is not None
            self.manifest = await asyncio.shield(self.first)  # others wait for it, too
        missed = 0
        try:
            while True:
                manifest = self.manifest
                try:
                    await self.load(member, manifest)
                except WeightsAway:
                    await self._newer_than(manifest, member)
                    continue
                except Retryable:
                    # The learner may have let go of a version that everybody else is past.
                    if manifest is self.manifest:
                        raise
                if manifest is self.manifest:
                    return
                missed += 1
                if missed >= MISSES and member.index not in self._awaited:
                    self._awaited[member.index] = asyncio.Event()
                    self._event("broadcast_awaits", worker=member.name, missed=missed)
        finally:
            self._await_no_longer(member)

    async def joined(self) -> None:
        """Wait for the joiners that have missed too many versions: until each holds the current
        one, has failed, or is not wanted any more."""
        awaited: Iterable[asyncio.Event] = list(self._awaited.values())
        await asyncio.gather(*(each.wait() for each in awaited))

    def _await_no_longer(self, member: Member) -> None:
        if (awaited := self._awaited.pop(member.index, None)) is not None:
            awaited.set()

    async def _newer_than(self, manifest: WeightManifest, member: Member) -> None:
        """Wait for the next learner's weights."""
        self._await_no_longer(member)  # they come by a broadcast, which must not wait in turn
        member.waits_for = "the learner"
        while self.manifest is manifest and member.status == "starting":
            await self._clock.sleep(LOOK_S)
        member.waits_for = "weights"

    async def _require_source(self, manifest: WeightManifest, problem: Retryable) -> None:
        """Raises WeightsAway where it is the learner that is gone: the worker is not to blame, and
        goes on with the weights it has."""
        if self._lost is not None and (manifest is self._lost or self.manifest is self._lost):
            raise WeightsAway(f"{problem}; their learner is gone") from problem
        try:
            await within(SOURCE_S, self.source())
        except (AccordError, TimeoutError) as gone:
            raise WeightsAway(f"{problem}; {gone}") from problem
