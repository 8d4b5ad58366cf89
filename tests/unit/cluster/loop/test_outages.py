"""What fails at every step is told when it begins and when it is over."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.contracts.protocols import Sink
from cluster.loop.outages import Outage, Sinks


class Disk:
    def __init__(self) -> None:
        self.full = False
        self.taken: list[int] = []

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        if self.full:
            raise OSError("full")
        self.taken.append(step)

    def close(self) -> None: ...


def test_an_outage_is_told_once_at_its_start_and_once_at_its_end() -> None:
    events: list[tuple[str, int, int | str]] = []

    def event(kind: str, *, sink: str, step: int, cause: str = "", failures: int = 0) -> None:
        assert sink == "Disk"
        events.append((kind, step, cause or failures))

    broken, sound = Disk(), Disk()
    added: list[Sink] = [broken]
    sinks = Sinks(added, event)
    added.append(sound)  # a run adds some when it has started
    for step in range(12):
        broken.full = 2 <= step < 6 or step == 9
        sinks.write(step, {})
    assert events == [
        ("sink_failed", 2, "OSError('full')"),
        ("sink_recovered", 6, 4),
        ("sink_failed", 9, "OSError('full')"),
        ("sink_recovered", 10, 1),
    ]
    assert sinks.errors == 5
    assert sound.taken == list(range(12))


def test_failures_are_counted_in_a_row() -> None:
    outage = Outage()
    assert outage.works() == 0
    assert [outage.fails(), outage.fails()] == [True, False]
    assert [outage.works(), outage.works()] == [2, 0]
    assert outage.fails()
