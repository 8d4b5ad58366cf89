"""Weights on their way, bucket by bucket: what overlaps, what is held at a time, what fails."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from cluster.contracts.errors import Fatal, Retryable, WeightMismatch
from cluster.contracts.records import Canary, WeightManifest
from cluster.weights.intake import Intake
from cluster.weights.transports import publish
from cluster.weights.update import Nowhere, Update, buckets_of

CANARY = Canary(token_ids=(1, 2, 3), logprobs=(-1.0, -2.0), tolerance=1e-3)
WAIT_S = 60.0
BUCKETS = 5


def bucket(number: int) -> dict[str, np.ndarray]:
    return {f"t{number}": np.full(4, number, np.float32)}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def announced(count: int = BUCKETS, version: int = 7) -> WeightManifest:
    with Update(version, "shelf", Nowhere()) as update:
        for number in range(count):
            update.add(bucket(number), {f"t{number}": "float32"})
        return update.close(CANARY)


class Carrier:
    """Notes what it is asked, in order; each `put` waits until the test lets it go on."""

    def __init__(self, gated: bool = False) -> None:
        self.asked: list[str] = []
        self.let_go = threading.Semaphore(0 if gated else 1000)
        self.fails_at = -1

    def put(self, arrays: Mapping[str, Any]) -> None:
        assert self.let_go.acquire(timeout=WAIT_S)
        self.asked += arrays
        if len(self.asked) - 1 == self.fails_at:
            raise OSError("no room")

    def finish(self) -> str:
        self.asked.append("finish")
        return "there"

    def discard(self) -> None:
        self.asked.append("discard")


def test_buckets_are_filled_up_to_their_limit_and_a_larger_tensor_is_alone() -> None:
    arrays = {str(i): np.zeros(size, np.uint8) for i, size in enumerate((4, 4, 3, 20, 1))}
    assert [list(part) for part in buckets_of(arrays, 8)] == [["0", "1"], ["2"], ["3"], ["4"]]
    assert list(buckets_of({}, 8)) == []


def test_the_manifest_names_the_bucket_of_each_tensor() -> None:
    made = announced()
    assert [(t.name, t.bucket) for t in made.tensors] == [(f"t{i}", i) for i in range(BUCKETS)]
    assert made.buckets == BUCKETS
    one = announced(1).tensors[0]
    assert (one.checksum, one.nbytes) == (made.tensors[0].checksum, 16)


def test_the_next_bucket_is_gathered_while_one_is_sent_and_no_more() -> None:
    carrier = Carrier(gated=True)
    update = Update(3, "x", carrier)
    gathered: list[int] = []

    def learner() -> None:
        for number in range(3):
            gathered.append(number)
            update.add(bucket(number), {f"t{number}": "float32"})

    thread = threading.Thread(target=learner, daemon=True)
    thread.start()
    wait_until(lambda: gathered == [0, 1])  # bucket 1 exists though 0 was not sent; 2 does not
    carrier.let_go.release()
    wait_until(lambda: gathered == [0, 1, 2])
    carrier.let_go.release(2)
    thread.join(WAIT_S)
    assert update.close(CANARY).locator == "there"
    assert carrier.asked == ["t0", "t1", "t2", "finish"]


def test_a_bucket_that_cannot_be_sent_discards_the_version() -> None:
    carrier = Carrier()
    carrier.fails_at = 1
    with Update(3, "x", carrier) as update:
        for number in range(4):
            update.add(bucket(number), {f"t{number}": "float32"})
        with pytest.raises(OSError, match="no room"):
            update.close(CANARY)
    assert carrier.asked == ["t0", "t1", "discard"]


@pytest.mark.parametrize("problem", [Fatal("tensor 't1' is not finite"), KeyboardInterrupt()])
def test_a_learner_that_fails_between_two_buckets_discards_the_version(
    problem: BaseException,
) -> None:
    carrier = Carrier()

    def fails() -> None:
        with Update(3, "x", carrier) as update:
            update.add(bucket(0), {"t0": "float32"})
            raise problem

    with pytest.raises(type(problem)):
        fails()
    assert carrier.asked == ["t0", "discard"]


def test_a_tensor_published_twice_is_refused() -> None:
    carrier = Carrier()
    with Update(3, "x", carrier) as update:
        update.add(bucket(0), {"t0": "float32"})
        update.add(bucket(0), {"t0": "float32"})
        with pytest.raises(ValueError, match="t0: published twice in version 3"):
            update.close(CANARY)
    assert carrier.asked == ["t0", "discard"]


def test_publishing_what_is_there_already_goes_in_buckets() -> None:
    class Publisher:
        on_device = False

        def __init__(self) -> None:
            self.carrier = Carrier()

        def open(self, version: int) -> Update:
            return Update(version, "x", self.carrier)

        def retain(self, versions: Any) -> None: ...

        def close(self) -> None: ...

    arrays = {**bucket(0), **bucket(1), **bucket(2)}
    made = publish(Publisher(), arrays, dict.fromkeys(arrays, "float32"), 1, CANARY, 40)
    assert [t.bucket for t in made.tensors] == [0, 0, 1]


class Source:
    """A receiver that counts the buckets which exist, and does with one what the test says."""

    def __init__(self, count: int = BUCKETS) -> None:
        self.count = count
        self.made: list[weakref.ref[Any]] = []
        self.asked = self.counted = 0
        self.most = 0
        self.closed = 0
        self.never = -1
        self.gate = threading.Event()
        self.change: dict[int, Any] = {}

    def fetch(self, manifest: WeightManifest, timeout_s: float) -> Iterator[dict[str, Any]]:
        try:
            for number in range(self.count):
                self.asked += 1
                if number == self.never:
                    self.gate.wait(WAIT_S)
                made = self.change.get(number, bucket(number))
                self.made += map(weakref.ref, made.values())
                gc.collect()
                self.most = max(self.most, sum(one() is not None for one in self.made))
                self.counted += 1
                yield made
                del made
        finally:
            self.closed += 1


def test_two_buckets_exist_at_a_time_on_the_way_in() -> None:
    source = Source()
    incoming = Intake(source, WAIT_S).take(announced())
    got = []
    for name, array in incoming:
        # The next one is fetched meanwhile, and no further one.
        wait_until(lambda: source.counted == min(BUCKETS, len(got) + 2))
        assert source.asked == source.counted
        got.append((name, float(array[0])))
        del array
    incoming.require_whole()
    assert got == [(f"t{i}", float(i)) for i in range(BUCKETS)]
    assert source.most == 2
    assert incoming.fetch_s >= 0 <= incoming.verify_s


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({3: {"t3": np.full(4, 9, np.float32)}}, "'t3': checksum"),
        ({3: {"t3": np.zeros(3, np.float32)}}, "'t3': shape"),
        ({3: {}}, "'t3': missing"),
        ({3: bucket(2)}, "'t3': missing"),
        ({2: {**bucket(2), **bucket(3)}}, "'t3': not announced"),
    ],
)
def test_a_wrong_bucket_ends_the_update(change: dict[int, Any], words: str) -> None:
    source = Source()
    got: list[str] = []
    source.change = change
    intake = Intake(source, WAIT_S)
    incoming = intake.take(announced())
    with pytest.raises(WeightMismatch, match=words):
        got.extend(name for name, _ in incoming)
    assert got == [f"t{i}" for i in range(min(change))]
    with pytest.raises(Fatal, match="version 7 unread"):
        incoming.require_whole()
    source.change = {}
    assert len(dict(intake.take(announced()))) == BUCKETS  # the next one is whole
    assert source.closed == 2


@pytest.mark.parametrize(("count", "words"), [(3, "3 of 5 buckets came"), (6, "more than the 5")])
def test_another_number_of_buckets_is_refused(count: int, words: str) -> None:
    with pytest.raises(WeightMismatch, match=words):
        dict(Intake(Source(count), WAIT_S).take(announced()))


def test_a_bucket_that_never_comes_is_named_and_the_next_update_is_taken() -> None:
    source = Source()
    source.never = 2
    deadline_s = 3.0  # of all buckets together: the first two have to come on a busy machine, too
    intake = Intake(source, deadline_s)
    with pytest.raises(
        Retryable, match="bucket 3 of 5 of the weights of version 7 did not come within 3 s"
    ):
        dict(intake.take(announced()))
    source.gate.set()
    source.never = -1
    assert len(dict(Intake(source, WAIT_S).take(announced(version=8)))) == BUCKETS
