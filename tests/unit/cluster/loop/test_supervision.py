"""When a worker that was lost is started again, and when that is given up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.loop.supervision import GiveUp, Loss, Restart, decide

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
    decision = decide([Loss(at) for at in losses], now, max_restarts=3)
    if after_s is None:
        assert decision == GiveUp("lost 4 times within 600 s")
    else:
        assert decision == Restart(after_s)


def test_no_restart_was_allowed() -> None:
    assert decide([Loss(5.0)], 5.0, max_restarts=0) == GiveUp("lost 1 times within 600 s")


def test_what_is_not_charged_is_never_given_up_but_waits_all_the_same() -> None:
    losses = [Loss(float(at), charged=False) for at in range(50)]
    assert decide(losses, 50.0, max_restarts=0) == Restart(30.0)
    assert decide(losses, 50.0, max_restarts=0, jitter=1.0) == Restart(15.0)


@given(
    gaps=st.lists(st.tuples(st.floats(0, 2000), st.booleans()), min_size=1, max_size=40),
    max_restarts=st.integers(0, 40),
    jitter=st.floats(0, 1),
)
def test_it_never_waits_longer_than_half_a_minute(
    gaps: list[tuple[float, bool]], max_restarts: int, jitter: float
) -> None:
    times = [sum(gap for gap, _ in gaps[: i + 1]) for i in range(len(gaps))]
    losses = [Loss(at, charged) for at, (_, charged) in zip(times, gaps, strict=True)]
    decision = decide(losses, times[-1], max_restarts=max_restarts, jitter=jitter)
    recent = sum(loss.charged for loss in losses if times[-1] - loss.at <= 600.0)
    assert isinstance(decision, GiveUp) == (recent > max_restarts and losses[-1].charged)
    if isinstance(decision, Restart):
        assert 0.0 <= decision.after_s <= 30.0
