"""Leases against the plain rule they speed up, and workers' counters over restarts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.contracts.records import Assignment, Prompt
from cluster.loop.leases import CounterSums, LeaseBook

PROMPT = Prompt(id="p", messages=(), token_ids=(1,))


def assignment(group_id: int, samples: int) -> Assignment:
    return Assignment(group_id=group_id, prompt=PROMPT, samples=samples)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6), st.integers(1, 9)), max_size=300),
)
def test_the_heap_gives_what_looking_at_every_worker_would(
    steps: list[tuple[int, int, int]],
) -> None:
    """Open, close, lose, finish and give in any order."""
    book = LeaseBook(lambda: 0.0)
    plain: dict[int, dict[int, int]] = {}  # open or closed worker -> group -> samples
    is_open: set[int] = set()
    for number, (what, worker, samples) in enumerate(steps):
        if what == 0:
            book.open(worker)
            is_open.add(worker)
            plain.setdefault(worker, {})
        elif what == 1 and worker in plain:
            book.close(worker)
            is_open.discard(worker)
        elif what == 2 and worker in plain:
            taken = [a.group_id for a in book.take_all(worker)]
            assert taken == list(plain[worker])
            plain[worker] = {}
            is_open.discard(worker)
        elif what <= 5 and plain.get(worker):
            group = sorted(plain[worker])[samples % len(plain[worker])]
            lease = book.take(worker, group)
            assert lease is not None
            assert lease.samples == plain[worker].pop(group)
            assert book.take(worker, group) is None
        else:
            expected = min(is_open, key=lambda w: (sum(plain[w].values()), w), default=None)
            assert book.give(assignment(number, samples)) == expected
            if expected is not None:
                plain[expected][number] = samples
        assert book.leased == sum(len(groups) for groups in plain.values())
        assert len(book._heap) <= 4 * max(1, len(plain)) + 66


def test_a_worker_with_enough_to_decode_is_given_no_more_until_it_has_finished_some() -> None:
    book = LeaseBook(lambda: 0.0, most=6)
    book.open(0)
    book.open(1)
    given = [book.give(assignment(group, 4)) for group in range(6)]
    # The limit is looked at before a group is given, which may go over it.
    assert given == [0, 1, 0, 1, None, None]
    book.progress(1, 1)  # seven left
    assert book.give(assignment(6, 4)) is None
    book.progress(1, 3)  # five left
    assert book.give(assignment(7, 4)) == 1
    assert book.take(0, 0) is not None
    assert book.give(assignment(8, 4)) == 0


def test_what_is_finished_of_open_groups_counts_for_the_lightest_worker() -> None:
    book = LeaseBook(lambda: 0.0)
    book.open(0)
    book.open(1)
    for group in range(2):
        book.give(assignment(group, 8))
    book.progress(1, 5)
    assert book.give(assignment(2, 1)) == 1
    # Its group is handed over: the count starts again from what the worker says then.
    book.progress(1, 0)
    assert book.take(1, 1) is not None
    assert book.holder(1).load == 1


def test_seconds_with_work_in_hand_are_those_of_each_worker() -> None:
    now = 0.0
    book = LeaseBook(lambda: now)
    book.open(0)
    book.open(1)
    now = 10.0
    for group in range(3):
        book.give(assignment(group, 1))  # to 0, to 1, to 0
    now = 13.0
    book.take(0, 0)
    assert book.holding_s() == 6.0
    now = 15.0
    book.take(0, 2)
    now = 20.0
    book.take_all(1)
    now = 90.0
    assert book.holding_s() == pytest.approx(5.0 + 10.0)


def test_counters_go_on_over_a_restart_and_gauges_are_left_out() -> None:
    sums = CounterSums()
    sums.report(0, 0, {"generated_tokens": 100.0, "unfinished": 7.0})
    sums.report(1, 0, {"generated_tokens": 50.0})
    sums.report(0, 0, {"generated_tokens": 130.0, "unfinished": 2.0})
    sums.report(0, 1, {"generated_tokens": 5.0})
    sums.report(0, 1, {"generated_tokens": 25.0})
    assert sums.totals == {"generated_tokens": 130.0 + 50.0 + 25.0}


def test_it_knows_how_long_each_lease_lasted() -> None:
    now = [0.0]
    book = LeaseBook(lambda: now[0])
    book.open(0)
    book.give(assignment(0, 1))
    now[0] = 2.0
    book.give(assignment(1, 1))
    now[0] = 7.0
    book.take(0, 1)
    book.take(0, 0)
    assert book.took_s == [5.0, 7.0]
