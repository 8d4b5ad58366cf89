"""What a run looks like at this moment, and what it waits for: pure accounting over facts that the
controller and the pool already have. Constant work for each worker; nothing is asked of anybody.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from cluster.contracts.live import (
    HISTORY_POINTS,
    STAGES,
    Bottleneck,
    History,
    LearnerState,
    LearnerView,
    LiveView,
    QueueView,
    RewardView,
    StalenessView,
    WeightsView,
    WorkerStatus,
    WorkerView,
)
from cluster.loop.advice import bottleneck

RATE_WINDOW_S = 10.0
SHARE_WINDOW_S = 60.0
SILENT_S = 10.0
"""A process that is this late with its answer counts as silent. With the time between two looks, a
stopped process shows within 15 seconds."""

Wait = Literal["learner", "weights", "groups"]
"""What a run waits for: the learner to train a step, weights on their way to the workers, or groups
to come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFacts:
    """What the pool knows of one worker. ``stats``: its own counters, as it last reported them;
    ``late_s``: since when it should have answered; negative: it may still take its time."""

    name: str
    incarnation: int
    status: WorkerStatus
    version: int
    groups: int
    heard_s_ago: float | None
    late_s: float
    finished: int  # groups handed back, scored
    stats: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolFacts:
    workers: Sequence[WorkerFacts]
    unplaced: int
    restarts: int
    left: int
    score_failures: int
    wanted: int = 1  # how many workers there are to be


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopFacts:
    """What the controller knows. ``waits``: seconds by ``Wait``."""

    step: int
    steps: int
    elapsed_s: float
    learner: LearnerState
    learner_since: float
    waits: Mapping[str, float]
    ready: int
    missing: int
    per_step: int
    published: int
    held: int
    sending: bool
    bound: int
    saved: int = 0  # step of the newest checkpoint
    paused: bool = False  # by a person
    under_way: tuple[str, ...] = ()  # what the loop has begun and not ended


@dataclass(slots=True)
class _Look:
    """What has to be remembered of one look, for the rates of later ones."""

    at: float
    stages: Mapping[str, float]  # seconds since the start, by stage
    workers: Mapping[str, WorkerFacts]
    score_s: float
    scored: int


@dataclass(slots=True)
class LiveMeter:
    """Turns facts into views. Keeps a few minutes of the past, for rates and curves."""

    run: str
    addresses: dict[str, str] = field(default_factory=dict)
    _looks: deque[_Look] = field(default_factory=deque)
    _history: deque[tuple[float, float, float, float | None, int, int]] = field(
        default_factory=lambda: deque(maxlen=HISTORY_POINTS)
    )

    def view(
        self,
        now: float,
        time: float,
        loop: LoopFacts,
        pool: PoolFacts,
        learner_heard_at: float | None,
        numbers: Mapping[str, float],
    ) -> LiveView:
        """``now``: of the loop's clock; ``time``: of day; ``numbers``: metrics of the last step."""
        look = self._remember(now, loop, pool)
        workers = tuple(self._worker(facts, now) for facts in pool.workers)
        shares = self._shares(look)
        statuses = Counter(worker.status for worker in workers)
        view = LiveView(
            run=self.run,
            time=round(time, 3),
            step=loop.step,
            steps=loop.steps,
            elapsed_s=round(loop.elapsed_s, 1),
            tokens_per_s=round(sum(worker.tokens_per_s for worker in workers), 1),
            trained_tokens_per_s=numbers.get("perf/throughput"),
            reward=numbers.get("objective/scores"),
            workers=workers,
            workers_by_status={
                "starting": statuses["starting"],
                "serving": statuses["serving"],
                "draining": statuses["draining"],
                "restarted": pool.restarts,
                "left": pool.left,
            },
            learner=_learner_view(now, loop, learner_heard_at, shares.get("learner", 0.0)),
            rewards=RewardView(
                waiting=sum(worker.scoring for worker in workers),
                seconds_per_group=self._seconds_per_group(look),
                failures=pool.score_failures,
            ),
            queue=QueueView(
                unplaced=pool.unplaced,
                in_flight=sum(worker.groups for worker in workers),
                ready=loop.ready,
                missing=loop.missing,
                per_step=loop.per_step,
            ),
            weights=WeightsView(
                published=loop.published,
                held=loop.held,
                sending=loop.sending,
                last_s=numbers.get("weight_sync/seconds"),
            ),
            staleness=StalenessView(
                bound=loop.bound,
                mean=numbers.get("async/staleness_mean"),
                max=numbers.get("async/staleness_max"),
            ),
            bottleneck=Bottleneck(shares=shares),
            addresses=dict(self.addresses),
        )
        return replace(view, bottleneck=bottleneck(view), history=self._remembered(view))

    # -- the past ---------------------------------------------------------------------------------

    def _remember(self, now: float, loop: LoopFacts, pool: PoolFacts) -> _Look:
        before = self._looks[-1] if self._looks else None
        stages = dict(before.stages) if before else {}
        waits = {stage: loop.waits.get(stage, 0.0) for stage in ("learner", "weights")}
        known = sum(waits.values()) + stages.get("rollout", 0.0) + stages.get("reward", 0.0)
        # The time in which groups were to come, since the last look.
        groups_s = max(0.0, sum(loop.waits.values()) - known)
        scored = groups_s * self._scoring_share(pool.workers, before)
        stages |= waits
        stages["reward"] = stages.get("reward", 0.0) + scored
        stages["rollout"] = stages.get("rollout", 0.0) + groups_s - scored
        look = _Look(
            at=now,
            stages=stages,
            workers={facts.name: facts for facts in pool.workers},
            score_s=sum(facts.stats.get("score_s", 0.0) for facts in pool.workers),
            scored=sum(facts.finished for facts in pool.workers),
        )
        self._looks.append(look)
        while self._looks[0].at < now - SHARE_WINDOW_S:
            self._looks.popleft()
        return look

    @staticmethod
    def _scoring_share(workers: Sequence[WorkerFacts], before: _Look | None) -> float:
        """Of the time in which groups were to come: the part in which they were scored, not
        generated. By the seconds that the workers spent with either since the last look."""
        spent = {"score_s": 0.0, "busy_s": 0.0}
        for facts in workers:
            old = before.workers.get(facts.name) if before else None
            base = old.stats if old is not None and old.incarnation == facts.incarnation else {}
            for counter in spent:
                spent[counter] += facts.stats.get(counter, 0.0) - base.get(counter, 0.0)
        total = sum(spent.values())
        if total > 0:
            return max(0.0, spent["score_s"] / total)
        # Nobody has finished anything: a call of the reward service that takes long, or a stop.
        return 1.0 if only_scoring(workers) else 0.0

    def _before(self, now: float, window_s: float) -> _Look:
        """The newest look that is ``window_s`` old, or the oldest there is."""
        older = [look for look in self._looks if look.at <= now - window_s]
        return older[-1] if older else self._looks[0]

    def _shares(self, look: _Look) -> dict[str, float]:
        before = self._looks[0]
        spent = {s: look.stages.get(s, 0.0) - before.stages.get(s, 0.0) for s in STAGES}
        total = sum(spent.values())
        return {s: round(spent[s] / total, 3) for s in STAGES} if total > 0 else {}

    def _seconds_per_group(self, look: _Look) -> float | None:
        before = self._looks[0]
        scored = look.scored - before.scored
        if scored <= 0 or look.score_s < before.score_s:  # a worker was lost with its counters
            return None
        return round((look.score_s - before.score_s) / scored, 4)

    def _worker(self, facts: WorkerFacts, now: float) -> WorkerView:
        before = self._before(now, RATE_WINDOW_S)
        old = before.workers.get(facts.name)
        same = old is not None and old.incarnation == facts.incarnation
        base: Mapping[str, float] = old.stats if old is not None and same else {}
        seconds = max(now - before.at, 1e-9)

        def rate(counter: str) -> float:
            return max(0.0, facts.stats.get(counter, 0.0) - base.get(counter, 0.0)) / seconds

        unfinished = int(facts.stats.get("unfinished", 0))
        running = min(unfinished, int(facts.stats.get("running", unfinished)))
        age = facts.heard_s_ago
        moved = now > before.at
        return WorkerView(
            name=facts.name,
            status=facts.status,
            tokens_per_s=round(rate("generated_tokens"), 1) if moved else 0.0,
            running=running,
            waiting=unfinished - running,
            groups=facts.groups,
            scoring=int(facts.stats.get("scoring", 0)),
            version=facts.version,
            busy=round(min(1.0, rate("busy_s")), 3) if moved else 0.0,
            heartbeat_age_s=None if age is None else round(age, 1),
            silent=age is not None and facts.late_s > SILENT_S,
        )

    def _remembered(self, view: LiveView) -> History:
        self._history.append(
            (
                view.time,
                view.tokens_per_s,
                view.learner.busy,
                view.staleness.mean,
                view.queue.ready,
                view.workers_by_status["serving"],
            )
        )
        return History(*zip(*self._history, strict=True))


def only_scoring(workers: Sequence[WorkerFacts]) -> bool:
    """Whether the groups in hand are all generated, and only their scores are to come."""
    groups = sum(facts.groups for facts in workers)
    return groups > 0 and not any(facts.stats.get("unfinished", 0.0) for facts in workers)


def _learner_view(now: float, loop: LoopFacts, heard_at: float | None, busy: float) -> LearnerView:
    age = None if heard_at is None else round(now - heard_at, 1)
    return LearnerView(
        state=loop.learner,
        state_s=round(now - loop.learner_since, 1),
        step=loop.step,
        busy=busy,
        heartbeat_age_s=age,
        silent=age is not None and age > SILENT_S,
    )
