"""Millions of random events over the admission ledger and the group buffer; every rule is checked
on the way. Learner steps, late weights, lost workers, doubled and late results, dropped prompts,
rollouts lost on their way to the learner, and stops with resume, in random order."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from cluster.contracts.records import GroupMeta, Harvest
from cluster.loop.staleness import AdmissionLedger, GroupBuffer

PER_STEP, BOUND, LONGEST = 32, 3, 60


class FirstDoneBuffer(GroupBuffer):
    """What the proof has to catch: steps of whatever is done first."""

    seen: set[int]

    def add(self, harvest: Harvest, groups: Iterable[GroupMeta]) -> None:
        self.seen = getattr(self, "seen", set())
        for meta in groups:
            if meta.group_id in self.seen:
                self.refused += 1
            else:
                self.seen.add(meta.group_id)
                self._ready[meta.group_id] = (meta, None)

    def take(self) -> Any:
        if len(self._ready) < self.ledger.prompts_per_step:
            return None
        first = list(self._ready)[: self.ledger.prompts_per_step]
        metas = [self._ready.pop(group)[0] for group in first]
        self.next_step += 1
        return None, metas


@dataclass(slots=True)
class Answer:
    """A group being made: by whom, from which version on, how long it is, when it is done."""

    worker: int
    version: int
    length: int
    attempt: int


def length_of(group: int) -> int:
    """Heavy-tailed, and the same whoever answers. Knuth's multiplicative hash for randomness."""
    unit = ((group * 2654435761 + 12345) % 2**32 + 1) / (2**32 + 1)
    return min(LONGEST, int(2.0 / unit**0.7))


@dataclass
class Proof:
    """One random history. ``events``: how many things have happened."""

    seed: int
    make: Callable[..., GroupBuffer] = GroupBuffer
    events: int = 0
    time: int = 0
    published: int = 0
    trained: int = 0  # groups trained, or dropped with their step: always the first so many
    running: dict[int, Answer] = field(default_factory=dict)
    due: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # time -> group, attempt
    trained_lengths: Any = None
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.trained_lengths = np.zeros(LONGEST + 1, dtype=np.int64)
        self.begin(0)

    def begin(self, step: int) -> None:
        """Start, or resume from the checkpoint of a step: all that was under way is gone."""
        self.ledger = AdmissionLedger(
            prompts_per_step=PER_STEP,
            bound=BOUND,
            last_step=10**9,
            admitted=step * PER_STEP,
            held=step,
        )
        self.buffer = self.make(self.ledger, next_step=step)
        self.published = step
        self.running.clear()
        self.due.clear()

    def count(self, kind: str, by: int = 1) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + by
        self.events += by

    def ask(self, group: int, attempt: int) -> None:
        length = length_of(group)
        version = self.random.randint(self.ledger.held, self.published)
        self.running[group] = Answer(self.random.randrange(16), version, length, attempt)
        self.due.setdefault(self.time + length, []).append((group, attempt))

    def tick(self) -> None:
        """One moment: what is due finishes, something random happens, what may start does."""
        self.time += 1
        finished = self.due.pop(self.time, [])
        self.random.shuffle(finished)
        for group, attempt in finished:
            self.finish(group, attempt)
        what = self.random.random()
        if what < 0.5:
            self.train()
        elif what < 0.9 and self.published > self.ledger.held:
            self.ledger.weights_held(self.random.randint(self.ledger.held + 1, self.published))
            self.count("weights held")
        elif what < 0.91:
            self.lose(self.random.randrange(16))
        elif what > 0.9995:
            self.begin(self.trained // PER_STEP)
            self.count("resume")
        for group in self.ledger.admit(self.ledger.room()):
            self.ask(group, 0)
            self.count("admitted")
        held_up = len(self.running) + len(self.buffer)
        assert held_up <= (BOUND + 1) * PER_STEP, f"{held_up} groups outstanding"

    def finish(self, group: int, attempt: int) -> None:
        answer = self.running.get(group)
        if answer is None or answer.attempt != attempt:
            self.count("late result")  # of a lost lease: the pool refuses it
            return
        del self.running[group]
        failure = "not text" if group % 997 == 5 else None
        meta = GroupMeta(
            group_id=group,
            attempt=attempt,
            samples=1,
            prompt_tokens=1,
            response_tokens=answer.length,
            version_min=answer.version,
            version_max=self.published,
            failure=failure,
        )
        before = self.buffer.refused
        times = 2 if self.random.random() < 0.05 else 1
        for _ in range(times):
            self.buffer.add(
                Harvest(worker="w", incarnation=0, groups=(meta,), payload=None), [meta]
            )
        assert self.buffer.refused == before + times - 1
        self.count("finished")
        self.count("doubled", times - 1)

    def lose(self, worker: int) -> None:
        for group, answer in list(self.running.items()):
            if answer.worker == worker:
                self.ask(group, answer.attempt + 1)
                self.count("asked again")
        old = self.trained - 1
        if old >= 0:  # a result of long ago turns up
            meta = GroupMeta(
                group_id=old,
                attempt=0,
                samples=1,
                prompt_tokens=1,
                response_tokens=1,
                version_min=0,
                version_max=0,
            )
            before = self.buffer.refused
            self.buffer.add(
                Harvest(worker="w", incarnation=0, groups=(meta,), payload=None), [meta]
            )
            assert self.buffer.refused == before + 1, "a trained group was accepted again"
            self.count("stale result")

    def train(self) -> None:
        step = self.buffer.next_step
        if step != self.published:  # the learner trains step s with version s
            return
        taken = self.buffer.take()
        if taken is None:
            return
        _, metas = taken
        if self.random.random() < 0.01:
            self.retry(step, metas)
            return
        self.check(step, metas)
        self.trained += PER_STEP
        self.published = step + 1
        self.count("step")

    def check(self, step: int, metas: list[GroupMeta]) -> None:
        groups = [meta.group_id for meta in metas]
        expected = list(range(self.trained, self.trained + PER_STEP))
        if self.make is GroupBuffer:
            assert groups == expected, "lost, doubled or out of order"
        for meta in metas:
            if meta.failure is not None:
                self.count("dropped")
                continue
            if self.make is GroupBuffer:
                assert 0 <= step - meta.version_min <= BOUND, f"{meta} at step {step}"
            self.trained_lengths[meta.response_tokens] += 1

    def retry(self, step: int, metas: list[GroupMeta]) -> None:
        """The rollouts of the step were lost: they are made again, from newer weights."""
        for meta in self.buffer.give_back(step, metas):
            self.ask(meta.group_id, meta.attempt + 1)
        self.count("step retried")

    def bias(self) -> float:
        """Largest difference between the distributions of trained and of all answers' lengths:
        that of the groups admitted up to the last one trained, long ones not yet done included."""
        lengths = [length_of(g) for g in range(self.trained) if g % 997 != 5]
        asked = np.bincount(lengths, minlength=LONGEST + 1).cumsum() / len(lengths)
        trained = self.trained_lengths.cumsum() / self.trained_lengths.sum()
        return float(np.abs(asked - trained).max())


def prove(events: int, seed: int) -> Proof:
    proof = Proof(seed)
    while proof.events < events:
        proof.tick()
    # Trained is exactly what was asked for, each once: not only in distribution.
    lengths = [length_of(g) for g in range(proof.trained) if g % 997 != 5]
    assert np.array_equal(np.bincount(lengths, minlength=LONGEST + 1), proof.trained_lengths)
    assert proof.bias() == 0.0
    kinds = {"resume", "late result", "doubled", "stale result", "dropped", "step retried"}
    assert kinds <= proof.counts.keys(), proof.counts
    return proof


@pytest.mark.long
def test_ten_million_events() -> None:
    """About half a minute of CPU time."""
    assert prove(10_000_000, 1).trained > 1_000_000


@pytest.mark.slow
@pytest.mark.parallel
def test_a_million_events() -> None:
    assert prove(1_000_000, 2).trained > 100_000


def test_a_hundred_thousand_events() -> None:
    assert prove(100_000, 0).trained > 10_000


def test_the_proof_sees_a_buffer_that_prefers_what_is_done_first() -> None:
    """Without resume and loss; the long answers are then left for ever later."""
    proof = Proof(0, make=FirstDoneBuffer)
    proof.begin(0)
    proof.lose = lambda worker: None  # type: ignore[method-assign]
    proof.retry = lambda step, metas: proof.check(step, metas)  # type: ignore[method-assign]
    go_on(proof, 2_000)
    assert proof.trained > 1000
    assert proof.bias() > 0.005
    lengths = [length_of(group) for group in range(proof.trained)]
    assert not np.array_equal(np.bincount(lengths, minlength=LONGEST + 1), proof.trained_lengths)


def test_the_proof_sees_one_admission_too_many() -> None:
    """Admission one step further ahead than the bound allows."""
    proof = Proof(3)
    proof.ledger.bound = BOUND + 1
    with pytest.raises(AssertionError, match=r"outstanding|at step"):
        go_on(proof, 2_000)


def go_on(proof: Proof, ticks: int) -> None:
    for _ in range(ticks):
        proof.tick()
