"""Each second of a learner step belongs to one part."""

from __future__ import annotations

from cluster.contracts.metrics import values
from cluster.contracts.step_parts import LEARNER_PARTS
from learner.rl.step_clock import StepClock


def test_parts_add_up_to_the_step() -> None:
    seconds = iter([10.0, 10.5, 12.0, 13.0, 15.0, 16.0])
    clock = StepClock(lambda: next(seconds))
    for part in ("forward", "backward", "forward", "publish"):
        clock.enters(part)
    found = values(clock.metrics())
    times = {part: found[f"time/{part}"] for part in LEARNER_PARTS}
    assert {part: spent for part, spent in times.items() if spent} == {
        "record": 0.5,
        "forward": 1.5 + 2.0,
        "backward": 1.0,
        "publish": 1.0,
    }
    assert sum(times.values()) == found["time/step"] == 6.0
