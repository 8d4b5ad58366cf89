"""What a run's controller can say of itself: times, throughput, overlap, waste, its own CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from cluster.contracts.errors import FAULTS, Fault
from cluster.contracts.metrics import values
from cluster.contracts.records import GroupMeta, StepResult, SwapReport
from cluster.contracts.step_parts import LoopPart
from cluster.loop.members import Status


class BatchSize(Protocol):
    @property
    def prompts_per_step(self) -> int: ...

    @property
    def samples_per_prompt(self) -> int: ...


class PoolNumbers(Protocol):
    """What the books of a run ask of its worker pool."""

    failed_swaps: int

    @property
    def left(self) -> int: ...

    @property
    def wanted(self) -> int: ...

    @property
    def restarts(self) -> int: ...

    @property
    def joined(self) -> int: ...

    @property
    def faults(self) -> Mapping[Fault, int]: ...

    @property
    def in_flight(self) -> int: ...

    @property
    def unread(self) -> int: ...

    def count(self, *statuses: Status) -> int: ...

    def take_durations(self) -> list[float]: ...

    def stats(self) -> Mapping[str, float]: ...

    def holding_s(self) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What stands in the controller's books at the end of a step."""

    queued: int
    refused: int
    refused_tokens: int
    dropped: int
    held: int  # the version every serving worker holds
    lead_s: float  # how long before its expected start a step's groups are admitted
    elapsed_s: float
    sink_errors: int


@dataclass(slots=True)
class _Window:
    """What happened since the last line of metrics."""

    started: float
    learner: Mapping[str, float]  # what it had done until then, seconds by state
    cpu_s: float
    stats: Mapping[str, float]
    failed_swaps: int
    bookkeeping: float = 0.0
    overlap_s: float = 0.0  # worker seconds with work in hand while the learner stepped
    swaps: list[SwapReport] = field(default_factory=list)
    broadcast_s: float = 0.0


class Accounts:
    """Collects during a step, answers ``numbers`` at its end. Seconds of the controller's clock.

    ``learner``: seconds of what it did until a moment, by its state.
    """

    def __init__(
        self,
        batch: BatchSize,
        pool: PoolNumbers,
        now: Callable[[], float],
        cpu_s: Callable[[], float],
        learner: Callable[[float], Mapping[str, float]],
    ) -> None:
        self._samples = batch.prompts_per_step * batch.samples_per_prompt
        self._pool = pool
        self._cpu_s = cpu_s
        self._learner = learner
        self._step_began = self.waiting_since = now()
        self._holding_at_begin = 0.0
        self._trained_tokens = 0
        self._lost_tokens = 0  # of steps whose rollouts were lost on the way to the learner
        self._window = self._new_window(self.waiting_since)

    def step_begins(self, now: float) -> None:
        self._step_began = now
        self._holding_at_begin = self._pool.holding_s()

    def step_ended(self, now: float, trained_tokens: int) -> float:
        """Returns when the step had begun."""
        self._learner_worked(now)
        self._trained_tokens += trained_tokens
        return self._step_began

    def step_lost(self, now: float, groups: Iterable[GroupMeta]) -> None:
        """The learner could not have its rollouts: ``groups`` are generated again."""
        self._learner_worked(now)
        self._lost_tokens += sum(meta.response_tokens for meta in groups)
        self.waiting_since = now

    def broadcast_ended(self, reports: Iterable[SwapReport], seconds: float) -> None:
        self._window.swaps += reports
        self._window.broadcast_s = seconds

    def next_window(self, now: float, *, waiting_since: float) -> None:
        """The next step's numbers count from ``now``; its learner waits for groups from a later
        moment, when the books of the step before are closed."""
        self.waiting_since = waiting_since
        self._window = self._new_window(now)
        self._window.bookkeeping = waiting_since - now

    def numbers(self, result: StepResult, now: float, standing: Standing) -> dict[str, float]:
        window, pool = self._window, self._pool
        # Two steps can end in the same moment of a virtual clock.
        wall = max(now - window.started, 1e-9)
        serving = pool.count("serving")
        numbers = {
            "async/queue_depth": standing.queued,
            "async/in_flight": pool.in_flight,
            "async/policy_version": result.version,
            "async/refused": standing.refused,
            "async/dropped": standing.dropped,
            "async/lead_s": standing.lead_s,
            "workers/alive": serving,
            "workers/wanted": pool.wanted,
            "workers/restarts": pool.restarts,
            "workers/joined": pool.joined,
            "workers/left": pool.left,
            "weight_sync/bytes": result.manifest.nbytes,
            "weight_sync/version": standing.held,
            "perf/throughput": result.trained_tokens / wall,
            "perf/samples_per_s": self._samples / wall,
            "perf/overlap_frac": min(1.0, window.overlap_s / (wall * max(1, serving))),
            "perf/controller_us": (self._cpu_s() - window.cpu_s) / self._samples * 1e6,
            "rollout/trained_tokens": self._trained_tokens,
            "rollout/lost_tokens": self._lost_tokens + standing.refused_tokens,
            "run/elapsed_s": standing.elapsed_s,
            "run/sink_errors": standing.sink_errors,
        }
        numbers |= {f"faults/{fault}": pool.faults[fault] for fault in FAULTS}
        numbers |= self._times(result, now, wall)
        numbers |= _group_seconds(pool.take_durations())
        return numbers | self._swap_numbers() | self._worker_numbers(wall, max(1, serving))

    def _times(self, result: StepResult, now: float, wall: float) -> dict[str, float]:
        """The step's seconds, and the parts of it in which the learner did not compute it. Of its
        own time it tells itself (``learner/rl/step_clock.py``)."""
        window, did = self._window, self._learner(now)
        spent = {state: seconds - window.learner.get(state, 0.0) for state, seconds in did.items()}
        asked, ahead = spent.get("training", 0.0), spent.get("ahead", 0.0)
        own = values(result.metrics).get("time/step", asked)
        loop: dict[LoopPart, float] = {
            "wait_batch": spent.get("waiting", 0.0) - window.bookkeeping,
            "ahead": ahead,
            "hand_over": asked - own,
            "bookkeeping": window.bookkeeping,
            "checkpoint": spent.get("saving", 0.0),
            "redo": spent.get("redo", 0.0) + spent.get("starting", 0.0),
        }
        return {
            "time/step": wall,
            # A moment that two clocks see a little differently is no negative time.
            **{f"time/{part}": max(0.0, seconds) for part, seconds in loop.items()},
            "perf/trainer_idle_frac": max(0.0, 1.0 - (own + ahead) / wall),
        }

    def _swap_numbers(self) -> dict[str, float]:
        window = self._window
        failed = self._pool.failed_swaps - window.failed_swaps
        numbers: dict[str, float] = {"weight_sync/failed_workers": failed}
        if window.swaps:
            # The slowest of all workers: admission waits for it.
            numbers |= {
                "weight_sync/seconds": window.broadcast_s,
                "weight_sync/pause_s": max(s.pause_s for s in window.swaps),
                "weight_sync/canary_logp_diff": max(s.canary_logp_diff for s in window.swaps),
            }
        return numbers

    def _worker_numbers(self, wall: float, serving: int) -> dict[str, float]:
        """From the workers' own counters; a worker that reports none leaves them out."""
        stats, before = self._pool.stats(), self._window.stats
        numbers = {}
        if "generated_tokens" in stats:
            generated = stats["generated_tokens"]
            numbers["rollout/generated_tokens"] = generated
            numbers["rollout/tokens_per_s"] = (
                generated - before.get("generated_tokens", 0.0)
            ) / wall
        # Counters come with a harvest, so a window may hold a little more or less than its own.
        if "busy_s" in stats:
            busy = stats["busy_s"] - before.get("busy_s", 0.0)
            numbers["perf/rollout_idle_frac"] = min(1.0, max(0.0, 1 - busy / (wall * serving)))
        return numbers

    def _learner_worked(self, now: float) -> None:
        self._window.overlap_s += self._pool.holding_s() - self._holding_at_begin

    def _new_window(self, now: float) -> _Window:
        pool = self._pool
        return _Window(
            started=now,
            learner=self._learner(now),
            cpu_s=self._cpu_s(),
            stats=pool.stats(),
            failed_swaps=pool.failed_swaps,
        )


def _group_seconds(took_s: list[float]) -> dict[str, float]:
    """How long groups took; a straggler shows as a maximum far above the median."""
    if not took_s:
        return {}
    took_s.sort()
    last = len(took_s) - 1
    return {
        "rollout/group_p50_s": took_s[round(0.5 * last)],
        "rollout/group_p95_s": took_s[round(0.95 * last)],
        "rollout/group_max_s": took_s[last],
    }
