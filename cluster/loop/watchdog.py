"""Whether a run stands still, and what it then waits for. Pure: facts in, a verdict or text out.

Each part of a run has a deadline of its own. This is for what they all miss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from cluster.contracts.live import LiveView
from cluster.loop.live import LoopFacts, PoolFacts, only_scoring

Verdict = Literal["", "stalled", "stop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnDeadlines:
    """Of the parts, in seconds; 0: none, it waits for ever."""

    learner_start_s: float
    step_s: float
    weights_s: float
    sampling_s: float
    workers_s: float
    outage_s: float
    evaluation_s: float
    min_workers: int


@dataclass(frozen=True, slots=True)
class WaitsFor:
    """``key``: of the configuration; its value is ``limit_s``, infinite for a wait without end."""

    what: str
    key: str
    limit_s: float


def waits_for(loop: LoopFacts, pool: PoolFacts, own: OwnDeadlines) -> WaitsFor:
    """The one that a run waits for, first of all those that keep the others waiting."""
    least = min(own.min_workers, pool.wanted)
    serving = sum(worker.status == "serving" for worker in pool.workers)
    if "successor" in loop.under_way:
        return WaitsFor("another learner to start", "learner.start_timeout_s", own.learner_start_s)
    if "step" in loop.under_way:
        return WaitsFor(f"learner step {loop.step}", "learner.step_timeout_s", own.step_s)
    groups = pool.unplaced + sum(worker.groups for worker in pool.workers)
    if "evaluation" in loop.under_way and not groups:
        what = "the completions of an evaluation, or its judge"
        return WaitsFor(what, "evaluation.timeout_s", own.evaluation_s)
    if "snapshot" in loop.under_way or loop.step == loop.steps:
        return WaitsFor("the learner to save its state", "learner.step_timeout_s", own.step_s)
    if serving < least:
        what = f"workers: {serving} serve, at least {least} must"
        return WaitsFor(what, "rollout.workers_timeout_s", own.workers_s or math.inf)
    if only_scoring(pool.workers):
        return WaitsFor("scores of finished completions", "reward.outage_s", own.outage_s)
    if "broadcast" in loop.under_way:
        what = f"workers to take the weights of version {loop.published}"
        return WaitsFor(what, "weights.timeout_s", own.weights_s)
    what = f"{loop.missing} of {loop.per_step} groups of step {loop.step}"
    return WaitsFor(what, "rollout.stall_timeout_s", own.sampling_s)


class Watchdog:
    """``timeout_s`` without any movement: "stalled", once. Twice as long: "stop", once; but later
    by the deadlines of all parts that were waited for meanwhile, so that those come first."""

    def __init__(self, timeout_s: float, own: OwnDeadlines) -> None:
        self._timeout_s, self._own = timeout_s, own
        self._seen: tuple[float, ...] = ()
        self._moved = 0.0
        self._limits: dict[str, float] = {}  # by key, of what was waited for since
        self._said: Verdict = ""

    def idle_s(self, now: float) -> float:
        return now - self._moved

    def look(self, now: float, loop: LoopFacts, pool: PoolFacts) -> Verdict:
        seen = _movement(loop, pool)
        # Before the start each role has its deadline; to pause, or to go on without workers, is a
        # person's wish.
        wished = loop.paused or pool.wanted == 0
        if seen != self._seen or not loop.waits or wished:
            self._seen, self._moved, self._limits, self._said = seen, now, {}, ""
            return ""
        wait = waits_for(loop, pool, self._own)
        self._limits[wait.key] = wait.limit_s
        last = max(2 * self._timeout_s, sum(self._limits.values()) + self._timeout_s)
        if self._said == "stalled" and self.idle_s(now) >= last:
            self._said = "stop"
            return "stop"
        if self._said == "" and self.idle_s(now) >= self._timeout_s:
            self._said = "stalled"
            return "stalled"
        return ""


def _movement(loop: LoopFacts, pool: PoolFacts) -> tuple[float, ...]:
    """Changes with each token, finished group, step, update of the workers' weights and save. A
    worker that is lost changes it once: not again, however often its successors are lost."""
    counters = ("generated_tokens", "unfinished_tokens")
    tokens = sum(worker.stats.get(name, 0.0) for worker in pool.workers for name in counters)
    finished = sum(worker.finished for worker in pool.workers)
    return tokens, finished, loop.ready, loop.step, loop.published, loop.held, loop.saved


def report(view: LiveView, loop: LoopFacts, wait: WaitsFor, idle_s: float) -> str:
    """Who waits for what, for a person."""
    limit = "which has no limit" if math.isinf(wait.limit_s) else f"{wait.limit_s:g} s"
    queue, weights, learner = view.queue, view.weights, view.learner
    under_way = ", ".join(loop.under_way) or "nothing"
    lines = [
        f"Nothing has moved for {idle_s:.0f} s: no token, no finished group, no step, no weights, "
        "no checkpoint.",
        f"The run waits for {wait.what}. Its own deadline is {wait.key}, {limit}.",
        "",
        f"step {loop.step} of {loop.steps}; under way in the loop: {under_way}",
        f"learner: {learner.state} for {learner.state_s:.0f} s, {_heard(learner.heartbeat_age_s)}",
        *(
            f"{worker.name}: {worker.status}, version {worker.version}, {worker.groups} groups, "
            f"{worker.running} completions running, {worker.waiting} queued, {worker.scoring} "
            f"groups to be scored, {_heard(worker.heartbeat_age_s)}"
            for worker in view.workers
        ),
        f"groups: {queue.unplaced} wait for a worker, {queue.in_flight} are at workers, "
        f"{queue.ready} wait for the rest of their step, which lacks {queue.missing} of "
        f"{queue.per_step}",
        f"weights: version {weights.published} is published, version {weights.held} is held by all "
        f"workers, {'one is' if weights.sending else 'none is'} being sent",
        f"scores: {view.rewards.waiting} groups wait, {view.rewards.failures} failures so far",
    ]
    return "\n".join(lines) + "\n"


def _heard(age_s: float | None) -> str:
    return "has not answered yet" if age_s is None else f"last answered {age_s:.0f} s ago"
