"""Which workers are sent an update together.

Workers ask one by one, and come and go between versions. Those that took the last version together
are waited for, so that the learner sends once for all of them; a worker that is late, new or back
is sent its own. A group is as fast as its slowest member: one that takes much longer than the
others to load what it gets is sent its own too, and so is, for good, one that did not come back
after its round broke (it was hung or stopped). Neither holds up anybody a second time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

GATHER_S = 1.0
"""For so long the first to ask waits for the others."""
SLOW_FACTOR, SLOW_S = 2.0, 1.0
"""A member is slow that takes so many times what the fastest takes, and so many seconds more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """member: number of a worker, new after it connects anew. first: bucket it needs next. group:
    the group that it still holds, 0 none. busy_s: seconds that loading the last update took it."""

    member: int
    number: int
    version: int
    first: int = 0
    group: int = 0
    busy_s: float = 0.0


@dataclass(eq=False, slots=True)
class Round:
    """asks: by member, in the order of their ranks. broken: to be given up."""

    version: int
    asks: tuple[Ask, ...]
    broken: bool = False

    @property
    def members(self) -> tuple[int, ...]:
        return tuple(ask.member for ask in self.asks)

    @property
    def first(self) -> int:
        """The bucket that it begins with: the earliest that a member lacks."""
        return min(ask.first for ask in self.asks)


@dataclass(slots=True)
class Gathering:
    """Not thread-safe. Times are seconds of one clock."""

    _asks: dict[int, tuple[Ask, float]] = field(default_factory=dict)
    _numbers: dict[int, int] = field(default_factory=dict)
    _running: list[Round] = field(default_factory=list)
    _waited_for: set[int] = field(default_factory=set)
    _came_through: set[int] = field(default_factory=set)  # of those, whose last round did not break
    _apart: set[int] = field(default_factory=set)

    def ask(self, ask: Ask, now: float) -> None:
        """A repeated message is ignored. The round that this member is in is given up."""
        if ask.number <= self._numbers.get(ask.member, 0):
            return
        self._numbers[ask.member] = ask.number
        for one in self._running:
            if ask.member in one.members:
                one.broken = True
        self._asks[ask.member] = (ask, now)

    def due(self, now: float) -> list[Round]:
        """Rounds to begin now."""
        found = [
            Round(ask.version, (ask,))
            for ask, _ in self._asks.values()
            if ask.member in self._apart and not self._busy({ask.member})
        ]
        for version in {ask.version for ask, _ in self._asks.values()}:
            waiting = [
                (ask, since)
                for ask, since in self._asks.values()
                if ask.version == version and ask.member not in self._apart
            ]
            if not waiting or self._busy({ask.member for ask, _ in waiting}):
                continue
            absent = self._waited_for - self._asks.keys()
            if absent and now < min(since for _, since in waiting) + GATHER_S:
                continue
            self._apart |= absent - self._came_through
            self._waited_for.clear()
            found += _by_speed(version, [ask for ask, _ in waiting])
        for one in found:
            self._running.append(one)
            for member in one.members:
                del self._asks[member]
        return found

    def _busy(self, members: set[int]) -> bool:
        """Whether one of them is still in a round that is being given up."""
        return any(members & set(one.members) for one in self._running)

    def ended(self, one: Round, whole: bool) -> None:
        self._running.remove(one)
        members = set(one.members) - self._apart
        self._waited_for |= members
        if whole:
            self._came_through |= members
        else:
            self._came_through -= members

    def wakes(self, now: float) -> float | None:
        """Seconds until `due` may say something new by itself; None: nobody waits."""
        if not self._asks:
            return None
        return max(0.0, min(since for _, since in self._asks.values()) + GATHER_S - now)

    def give_up(self) -> None:
        """End all rounds."""
        for one in self._running:
            one.broken = True


def _by_speed(version: int, asks: list[Ask]) -> list[Round]:
    """One round for all but the slow ones, and one for each of these."""
    most = SLOW_FACTOR * min(ask.busy_s for ask in asks) + SLOW_S
    slow = [ask for ask in asks if ask.busy_s > most]
    together = sorted((ask for ask in asks if ask not in slow), key=lambda ask: ask.member)
    return [Round(version, tuple(together)), *(Round(version, (ask,)) for ask in slow)]
