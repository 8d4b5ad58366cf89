"""When a worker that was lost is started again, and when that is given up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.loop.supervision import GiveUp, Restart, decide

LOSSES = [
    # times of the losses, now, seconds until the restart (None: no restart)
    ([0.0], 0.0, 0.0),  # the first time at once
    ([0.0, 1.0], 1.0, 1.0),
    ([0.0, 1.0, 2.0], 2.0, 2.0),
    ([0.0, 1.0, 2.0, 3.0], 3.0, None),
    ([0.0, 1.0, 2.0, 700.0], 700.0, 0.0),  # the old ones are forgotten
    ([0.0, 650.0, 660.0], 660.0, 1.0),
    ([0.0, 600.0], 600.0, 1.0),  # to the last second of the window
    ([0.0, 600.1], 600.1, 0.0),
]


@pytest.mark.parametrize(("losses", "now", "after_s"), LOSSES)
def test_restarts_back_off_and_end(losses: list[float], now: float, after_s: float | None) -> None:
    decision = decide(losses, now, max_restarts=3)
    if after_s is None:
        assert decision == GiveUp("lost 4 times within 600 s")
    else:
        assert decision == Restart(after_s)


def test_no_restart_was_allowed() -> None:
    assert decide([5.0], 5.0, max_restarts=0) == GiveUp("lost 1 times within 600 s")


@given(gaps=st.lists(st.floats(0, 2000), min_size=1, max_size=40), max_restarts=st.integers(0, 40))
def test_it_never_waits_longer_than_half_a_minute(gaps: list[float], max_restarts: int) -> None:
    times = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    decision = decide(times, times[-1], max_restarts=max_restarts)
    recent = sum(times[-1] - t <= 600.0 for t in times)
    assert isinstance(decision, GiveUp) == (recent > max_restarts)
    if isinstance(decision, Restart):
        assert 0.0 <= decision.after_s <= 30.0
