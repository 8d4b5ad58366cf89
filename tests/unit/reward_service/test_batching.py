from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from cluster.contracts.errors import BadReward, RewardFailure
from cluster.contracts.records import Score
from reward_service.batching import (
    BatchQueue,
    Coalescer,
    DeadlinePassed,
    Job,
    Overloaded,
    ScoreItems,
)
from reward_service.reply_cache import ReplyCache, RequestMismatch
from reward_service.source import ScoreItem


def items(*names: str) -> list[ScoreItem]:
    return [
        ScoreItem(id=n, messages=({"role": "user", "content": "q"},), response=n) for n in names
    ]


def job(*names: str, deadline: float = 1e9) -> Job:
    return Job(items(*names), deadline)


def echo(batch: Sequence[ScoreItem]) -> list[Score]:
    return [Score(value=float(len(item.id)), scorer_version="v") for item in batch]


def test_a_batch_is_due_when_full_or_when_the_oldest_waited() -> None:
    queue = BatchQueue(max_batch=3, max_wait_s=2.0, max_pending=10)
    assert queue.wait_s(0.0) is None
    queue.add(job("a"), 10.0)
    queue.add(job("b"), 11.0)
    assert queue.wait_s(11.0) == 1.0
    assert queue.wait_s(12.5) == 0.0
    queue.add(job("c"), 11.0)
    assert queue.wait_s(11.0) == 0.0


def test_take_keeps_order_never_splits_and_drops_the_late() -> None:
    queue = BatchQueue(max_batch=3, max_wait_s=0.0, max_pending=100)
    jobs = [job("a", "b"), job("late", deadline=5.0), job("c"), job("d", "e", "f", "g"), job("h")]
    for entry in jobs:
        queue.add(entry, 0.0)
    assert queue.take(6.0) == ([jobs[0], jobs[2]], [jobs[1]])
    assert queue.take(6.0) == ([jobs[3]], [])
    assert queue.pending == 1
    assert queue.take(6.0) == ([jobs[4]], [])


def test_the_queue_is_bounded_but_takes_one_large_job() -> None:
    queue = BatchQueue(max_batch=1, max_wait_s=0.0, max_pending=2)
    queue.add(job("a", "b", "c"), 0.0)
    with pytest.raises(Overloaded):
        queue.add(job("d"), 0.0)


@contextmanager
def coalescer(score: ScoreItems, **settings: float) -> Iterator[Coalescer]:
    made = Coalescer(
        score,
        max_batch=int(settings.get("max_batch", 64)),
        max_wait_s=settings.get("max_wait_s", 0.0),
    )
    try:
        yield made
    finally:
        assert made.close()


def soon() -> float:
    return time.monotonic() + 30


def test_results_go_back_to_who_asked() -> None:
    with coalescer(echo, max_wait_s=0.2) as made:
        jobs = [made.submit(items(*["x" * n] * n), soon()) for n in (1, 2, 3)]
        values = [[s.value for s in entry.future.result(5)] for entry in jobs]
    assert values == [[1.0], [2.0, 2.0], [3.0, 3.0, 3.0]]
    assert (made.batches, made.items) == (1, 6)


def test_a_large_request_is_scored_in_pieces() -> None:
    sizes: list[int] = []

    def score(batch: Sequence[ScoreItem]) -> list[Score]:
        sizes.append(len(batch))
        return echo(batch)

    with coalescer(score, max_batch=2) as made:
        assert len(made.submit(items(*"abcde"), soon()).future.result(5)) == 5
    assert sizes == [2, 2, 1]


def test_an_error_hits_only_its_own_request() -> None:
    def score(batch: Sequence[ScoreItem]) -> list[Score]:
        if any(item.id == "bad" for item in batch):
            raise BadReward("bad item")
        return echo(batch)

    with coalescer(score, max_wait_s=0.2) as made:
        good, bad, other = (made.submit(items(n), soon()) for n in ("good", "bad", "x"))
        assert good.future.result(5)[0].value == 4
        assert other.future.result(5)[0].value == 1
        with pytest.raises(BadReward, match="bad item"):
            bad.future.result(5)


def test_a_source_that_is_down_is_not_asked_once_a_request() -> None:
    calls = 0

    def score(batch: Sequence[ScoreItem]) -> list[Score]:
        nonlocal calls
        calls += 1
        raise RewardFailure("down")

    with coalescer(score, max_wait_s=0.2) as made:
        jobs = [made.submit(items(n), soon()) for n in "abc"]
        for entry in jobs:
            with pytest.raises(RewardFailure):
                entry.future.result(5)
    assert calls == 1


def test_a_wrong_count_and_an_exit_are_errors_and_the_thread_lives() -> None:
    answers = iter([[], SystemExit(1)])

    def score(batch: Sequence[ScoreItem]) -> list[Score]:
        answer = next(answers, None)
        if isinstance(answer, SystemExit):
            raise answer
        return echo(batch) if answer is None else []

    with coalescer(score) as made:
        with pytest.raises(RuntimeError, match="0 scores for 1"):
            made.submit(items("a"), soon()).future.result(5)
        with pytest.raises(RuntimeError, match="SystemExit"):
            made.submit(items("a"), soon()).future.result(5)
        assert made.submit(items("a"), soon()).future.result(5)[0].value == 1


def test_work_nobody_waits_for_is_dropped() -> None:
    hold = threading.Event()

    def score(batch: Sequence[ScoreItem]) -> list[Score]:
        hold.wait(5)
        return echo(batch)

    with coalescer(score) as made:
        first = made.submit(items("a"), soon())
        while made.batches == 0:
            time.sleep(0.001)
        late = made.submit(items("b"), time.monotonic() - 1)
        hold.set()
        first.future.result(5)
        with pytest.raises(DeadlinePassed):
            late.future.result(5)
    assert made.items == 1


def test_closing_fails_what_waits() -> None:
    hold = threading.Event()

    def score(batch: Sequence[ScoreItem]) -> list[Score]:
        hold.wait(5)
        return echo(batch)

    made = Coalescer(score, max_batch=1, max_wait_s=0.0)
    running = made.submit(items("a"), soon())
    while made.batches == 0:
        time.sleep(0.001)
    waiting = made.submit(items("b"), soon())
    threading.Timer(0.1, hold.set).start()
    assert made.close()
    assert running.future.result(0)
    with pytest.raises(Overloaded, match="shutting down"):
        waiting.future.result(0)
    with pytest.raises(Overloaded):
        made.submit(items("c"), soon())


def test_a_repeat_joins_the_first_and_moves_its_deadline() -> None:
    cache = ReplyCache()
    first = cache.job("r", b"d", 5.0, lambda: job("a", deadline=5.0))
    again = cache.job("r", b"d", 9.0, lambda: pytest.fail("scored twice"))
    assert again is first
    assert first.deadline == 9.0
    with pytest.raises(RequestMismatch):
        cache.job("r", b"other", 9.0, lambda: job("b"))


def test_a_failed_reply_is_not_kept_and_old_ones_are_forgotten() -> None:
    cache = ReplyCache(size=2)
    first = cache.job("r", b"d", 5.0, lambda: job("a"))
    first.future.set_exception(BadReward("no"))
    assert cache.job("r", b"d", 5.0, lambda: job("a")) is not first
    kept = cache.job("s", b"d", 5.0, lambda: job("a"))
    cache.job("t", b"d", 5.0, lambda: job("a"))
    assert cache.job("s", b"d", 5.0, lambda: job("a")) is kept
    assert cache.job("r", b"d", 5.0, lambda: job("z")).items[0].id == "z"


def test_a_job_that_is_done_lets_go_of_its_items() -> None:
    one = job("a")
    one.settle([Score(value=1.0, parts={}, scorer_version="v")])
    assert one.items == ()
    assert one.future.result(0)[0].value == 1.0


def test_replies_are_forgotten_when_they_take_too_much_memory() -> None:
    """Counted by their content: one with long texts weighs what a hundred others do."""
    cache = ReplyCache(size=1000, most_bytes=100_000)
    for number in range(50):
        cache.job(f"r{number}", b"d", 5.0, lambda: job("a")).settle(
            [Score(value=1.0, parts={"rules": 1.0}, scorer_version="v")]
        )
    assert len(cache._jobs) == 50
    cache.job("long", b"d", 5.0, lambda: job("a")).settle(
        [Score(value=1.0, parts={}, scorer_version="v", vetoes=("x" * 90_000,))]
    )
    assert "long" in cache._jobs
    assert "r0" not in cache._jobs
    assert cache._bytes <= 100_000
    cache.job("far too long", b"d", 5.0, lambda: job("a")).settle(
        [Score(value=1.0, parts={}, scorer_version="v", vetoes=("x" * 200_000,))]
    )
    assert cache._bytes == 0
