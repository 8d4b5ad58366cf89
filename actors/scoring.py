"""Finished groups -> scored groups, off the engine's thread, so that generation never waits."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import tenacity

from cluster.contracts.errors import (
    AccordError,
    BadReward,
    Late,
    RewardFailure,
    RewardsAway,
    Unexpected,
    Unrated,
    UserError,
)
from cluster.contracts.protocols import Scorer
from cluster.contracts.records import (
    Assignment,
    Completion,
    GroupMeta,
    Rollout,
    RolloutGroup,
    Score,
)

Decode = Callable[[Sequence[Sequence[int]]], list[str]]
"""Token ids of many answers -> their texts, in one call of the tokenizer."""
Deliver = Callable[[GroupMeta, RolloutGroup | None], None]


@dataclass(frozen=True, slots=True)
class FinishedGroup:
    """All samples of an assignment, or why there are none."""

    assignment: Assignment
    completions: Mapping[int, Completion]
    problem: UserError | Late | Unrated | None
    began: float = 0.0  # seconds of time.perf_counter; when the engine was given the group
    generated: float = 0.0  # when the last of its samples was finished

    def failed(self) -> GroupMeta:
        return GroupMeta(
            group_id=self.assignment.group_id,
            attempt=self.assignment.attempt,
            samples=0,
            prompt_tokens=len(self.assignment.prompt.token_ids),
            response_tokens=0,
            version_min=-1,
            version_max=-1,
            failure=str(self.problem),
            unrated=isinstance(self.problem, Unrated),
            late=isinstance(self.problem, Late),
        )

    def meta(self) -> GroupMeta:
        """``prompt_tokens`` counts the prompt once, ``response_tokens`` all samples."""
        done = list(self.completions.values())
        versions = [span.version for completion in done for span in completion.versions]
        return GroupMeta(
            group_id=self.assignment.group_id,
            attempt=self.assignment.attempt,
            samples=len(done),
            prompt_tokens=len(self.assignment.prompt.token_ids),
            response_tokens=sum(len(completion.token_ids) for completion in done),
            version_min=min(versions),
            version_max=max(versions),
            generate_s=self.generated - self.began,
            score_s=time.perf_counter() - self.generated if self.generated else 0.0,
        )


def rollouts_of(groups: Sequence[FinishedGroup], decode: Decode) -> list[list[Rollout]]:
    """The samples of each group, in order, with their texts."""
    answers = [[g.completions[i] for i in range(g.assignment.samples)] for g in groups]
    texts = iter(decode([done.token_ids for answer in answers for done in answer]))
    return [
        [
            Rollout(
                prompt=group.assignment.prompt, completion=done, sample_index=i, text=next(texts)
            )
            for i, done in enumerate(answer)
        ]
        for group, answer in zip(groups, answers, strict=True)
    ]


class GroupScorer:
    """Threads that score whatever groups wait, several in one call when they queue up.

    While the scorer cannot be had (RewardFailure), groups are kept and asked for again, for
    ``outage_s`` seconds: completions are never sampled again for want of a score. An unusable
    answer (BadReward) is asked for once more. What remains goes to ``on_failure``: it must end the
    worker, not become a number. A group of which one completion has no score (Unrated) fails alone.
    """

    def __init__(
        self,
        scorer: Scorer,
        decode: Decode,
        deliver: Deliver,
        on_failure: Callable[[BaseException], None],
        threads: int,
        batch: int,
        outage_s: float = 300.0,
        longest_pause_s: float = 10.0,
    ) -> None:
        self._scorer = scorer
        self._decode = decode
        self._deliver = deliver
        self._on_failure = on_failure
        self._batch = batch
        self._outage_s = outage_s
        self._longest_pause_s = longest_pause_s
        self._queue: queue.SimpleQueue[FinishedGroup | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._in_hand = 0  # groups of calls under way
        self._down: dict[int, float] = {}  # thread -> since when the scorer fails it
        self._count = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, name=f"scoring-{i}", daemon=True)
            for i in range(threads)
        ]
        self.busy_s = 0.0
        for thread in self._threads:
            thread.start()

    def put(self, group: FinishedGroup) -> None:
        self._queue.put(group)

    @property
    def waiting(self) -> int:
        """Groups that are generated and have no scores yet."""
        return self._queue.qsize() + self._in_hand

    @property
    def down_s(self) -> float:
        """For how long the scorer has given no answer; 0 while it answers."""
        with self._count:
            return time.monotonic() - min(self._down.values()) if self._down else 0.0

    def stop(self) -> None:
        """Ask the threads to end; a call in progress keeps its own deadline."""
        self._stopping.set()
        for _ in self._threads:
            self._queue.put(None)

    def _run(self) -> None:
        while (groups := self._take()) is not None:
            began = time.perf_counter()
            self._hold(len(groups))
            try:
                self._score(groups)
            except AccordError as problem:
                self._on_failure(problem)
            except Exception as problem:
                unexpected = Unexpected(f"scoring failed: {type(problem).__name__}: {problem}")
                unexpected.__cause__ = problem
                self._on_failure(unexpected)
            self._hold(-len(groups))
            self.busy_s += time.perf_counter() - began

    def _hold(self, groups: int) -> None:
        with self._count:
            self._in_hand += groups

    def _take(self) -> list[FinishedGroup] | None:
        """Wait for a group; add those already waiting, up to the batch. None: end."""
        first = self._queue.get()
        if first is None:
            return None
        # One call for all that wait: the reward service batches, and each call has its own cost.
        groups, count = [first], first.assignment.samples
        while count < self._batch:
            try:
                more = self._queue.get_nowait()
            except queue.Empty:
                break
            if more is None:
                self._queue.put(None)  # for whoever comes next, this thread included
                break
            groups.append(more)
            count += more.assignment.samples
        return groups

    def _score(self, groups: list[FinishedGroup]) -> None:
        for group in groups:
            if group.problem is not None:
                self._deliver(group.failed(), None)
        groups = [group for group in groups if group.problem is None]
        if not groups:
            return
        answers = rollouts_of(groups, self._decode)
        rollouts = [rollout for answer in answers for rollout in answer]
        try:
            scores = self._scores(rollouts)
        except Unrated as problem:
            self._fail_alone(groups, problem)
            return
        if scores is not None:
            self._hand_over(groups, answers, scores)

    def _fail_alone(self, groups: list[FinishedGroup], problem: Unrated) -> None:
        """One completion of these groups has no score. Each group is scored by itself, and the one
        that it belongs to fails."""
        if len(groups) == 1:
            self._deliver(replace(groups[0], problem=problem).failed(), None)
            return
        for group in groups:
            self._score([group])

    def _scores(self, rollouts: list[Rollout]) -> list[Score] | None:
        """Kept at through an outage; None when this is stopped meanwhile. Raises RewardsAway for
        an outage that is too long."""
        began = time.monotonic()
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(RewardFailure),
            stop=tenacity.stop_after_delay(self._outage_s)
            | tenacity.stop_when_event_set(self._stopping),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=self._longest_pause_s),
            sleep=tenacity.sleep_using_event(self._stopping),
            after=lambda _: self._is_down(True),
            reraise=True,
        )
        try:
            return retrying(self._usable, rollouts)
        except RewardFailure as problem:
            if self._stopping.is_set():
                return None
            # The last call may have begun just before the limit, and has a deadline of its own.
            waited_s = time.monotonic() - began
            raise RewardsAway(
                f"rewards could not be had for {waited_s:.0f} s (reward.outage_s = "
                f"{self._outage_s:g}): {problem}"
            ) from problem
        finally:
            self._is_down(False)

    def _is_down(self, down: bool) -> None:
        with self._count:
            if down:
                self._down.setdefault(threading.get_ident(), time.monotonic())
            else:
                self._down.pop(threading.get_ident(), None)

    def _usable(self, rollouts: list[Rollout]) -> list[Score]:
        """A reply may be torn once; a scorer that repeats it is wrong."""
        try:
            return self._checked(rollouts)
        except Unrated:
            raise
        except BadReward:
            return self._checked(rollouts)

    def _checked(self, rollouts: list[Rollout]) -> list[Score]:
        scores = self._scorer.score(rollouts)
        if len(scores) != len(rollouts):
            raise BadReward(f"{len(rollouts)} rollouts were scored with {len(scores)} scores")
        return scores

    def _hand_over(
        self, groups: list[FinishedGroup], answers: list[list[Rollout]], scores: list[Score]
    ) -> None:
        rest = iter(scores)
        for group, answer in zip(groups, answers, strict=True):
            pairs = tuple((rollout, next(rest)) for rollout in answer)
            done = RolloutGroup(group_id=group.assignment.group_id, samples=pairs)
            self._deliver(group.meta(), done)
