"""What may fail at every step without ending a run. It is told when it begins to fail and when it
works again, not at every step between."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cluster.contracts.protocols import Sink


@dataclass(slots=True)
class Outage:
    failures: int = 0  # in a row

    def fails(self) -> bool:
        """Note a failure. Returns whether it is the first in a row, which is to be told."""
        self.failures += 1
        return self.failures == 1

    def works(self) -> int:
        """Note a success. Returns how many failures in a row it ends."""
        ended, self.failures = self.failures, 0
        return ended


class Sinks:
    """Hands the numbers of each step to every sink. One that fails does not stop the others."""

    def __init__(self, sinks: Sequence[Sink], event: Callable[..., None]) -> None:
        """``sinks``: may grow later. ``event``: is told of each outage."""
        self.errors = 0  # of all sinks and steps
        self._sinks = sinks
        self._event = event
        self._outages: defaultdict[int, Outage] = defaultdict(Outage)  # by the sink's identity

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for sink in self._sinks:
            name, outage = type(sink).__name__, self._outages[id(sink)]
            try:
                sink.write(step, numbers)
            except Exception as problem:  # monitoring may fail in every way
                self.errors += 1
                if outage.fails():
                    self._event("sink_failed", sink=name, step=step, cause=repr(problem))
            else:
                if failures := outage.works():
                    self._event("sink_recovered", sink=name, step=step, failures=failures)
