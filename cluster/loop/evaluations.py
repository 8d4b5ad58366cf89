"""The policy evaluated while it trains: when, by whom it is sampled, and what follows.

An evaluation waits until every serving worker holds the weights of its step. Workers then sample
its prompts beside their groups, and a judge scores the completions outside the loop. Training goes
on meanwhile, with three exceptions. The first step waits for the evaluation of the start, which
could not be had later. A step waits for the copy of the learner's state, where the best checkpoint
is kept. And with ``staleness.bound = 0`` an evaluation has the engines for itself: it begins when
all groups of a step are there, which is when workers have nothing else to do, and the next weights
are sent after it. So what training samples is the same, bit for bit, with evaluations and without,
where each completion has a seed of its own (``rollout.request_seeds``).

An evaluation that cannot be had leaves a row that says why. One that was lost with the command is
made up for at the step at which the run goes on.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from cluster.contracts.config.evaluation import EvaluationConfig
from cluster.contracts.deadlines import within
from cluster.contracts.errors import AccordError
from cluster.contracts.records import Draw, Prompt, Rollout
from cluster.loop.beside import Sampled, Wanted
from cluster.loop.best import BestSoFar
from cluster.loop.context import LoopContext
from cluster.loop.ending import Ending
from cluster.loop.saving import Saving
from cluster.loop.staleness import AdmissionLedger
from cluster.runs.evaluations import Evaluation, EvaluationFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A judge's: mean score, and the win rate against the start with its interval, None without."""

    score: float
    win_rate: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None


class Judge(Protocol):
    """Scores the completions of an evaluation, off the event loop. ``was_reward``: it is what the
    policy is trained on."""

    name: str
    was_reward: bool

    async def judge(self, step: int, rollouts: Sequence[Rollout]) -> Verdict: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRole:
    """What a run needs to evaluate its policy. ``seed``: of the completions, the same at every
    step, so that two policies differ by their weights alone."""

    config: EvaluationConfig
    prompts: Sequence[Prompt]
    judge: Judge
    files: EvaluationFiles
    seed: int


class Samplers(Protocol):
    """What an evaluation asks of the worker pool."""

    @property
    def in_flight(self) -> int: ...

    async def sample(self, wanted: Wanted) -> Sampled: ...


class Evaluations:
    """``note``: takes numbers into the next line of metrics."""

    def __init__(
        self,
        role: EvaluationRole | None,
        samplers: Samplers,
        ledger: AdmissionLedger,
        saving: Saving,
        ending: Ending,
        note: Callable[[Mapping[str, float]], None],
        loop: LoopContext,
        first: int,
    ) -> None:
        """``first``: the step at which the run begins or goes on."""
        self._role = role
        self._samplers = samplers
        self._ledger = ledger
        self._saving = saving
        self._ending = ending
        self._note = note
        self._event = loop.run.event
        self._activities = loop.activities
        self._clock = loop.clock
        self._timeline = loop.timeline
        self._steps = loop.settings.steps
        self._alone = loop.settings.staleness_bound == 0
        self._wanted: int | None = None  # the step to be evaluated next
        self._current: int | None = None  # the step that is being evaluated
        self._kl: float | None = None  # that the learner measured in the step to be evaluated
        self._last = -1  # step of the last evaluation
        self.stopped: str | None = None  # why the run ends before its last step
        if role is not None:
            self._begin_at(role, first)

    def _begin_at(self, role: EvaluationRole, first: int) -> None:
        rows = role.files.rows_until(first)
        self._best = BestSoFar.of(role.config, rows)
        self._last = rows[-1].step if rows else -1
        if first == 0 and role.config.start and self._last < 0:
            self._wanted = 0
        elif first > 0:
            self._want_if_due(role.config, first)

    # -- who waits for it -------------------------------------------------------------------------

    @property
    def open(self) -> bool:
        """Whether one is under way, or has still to begin."""
        return self._wanted is not None or self._current is not None

    @property
    def holds_first_step(self) -> bool:
        return 0 in (self._wanted, self._current)

    @property
    def holds_weights(self) -> bool:
        """Whether workers must not be given newer weights now."""
        if not self._alone:
            return False
        waits = self._wanted is not None and self._ledger.held >= self._wanted
        return waits or self._current is not None

    # -- when -------------------------------------------------------------------------------------

    def step_ended(self, done: int, numbers: Mapping[str, float]) -> None:
        """``done`` steps are finished; ``numbers``: the learner's of the last one."""
        if self._role is None:
            return
        self._want_if_due(self._role.config, done, numbers.get("objective/kl"))

    def _want_if_due(self, config: EvaluationConfig, done: int, kl: float | None = None) -> None:
        """One at a time: what is due while another one goes on is made up for after it."""
        every, last = config.every, max(0, self._last)
        due = done // every > last // every or done >= self._steps
        if not due or self.open or done == self._last:
            return
        self._wanted, self._kl = done, kl
        if config.keep_best:
            self._saving.want(done)

    def start(self) -> None:
        """Begin the one that is due, once the workers hold its weights."""
        if self._role is None or self._wanted is None or self._ledger.held < self._wanted:
            return
        if self._alone and (self._samplers.in_flight or self._ledger.room()):
            return
        step, self._wanted = self._wanted, None
        self._current = step
        self._event("evaluation_began", step=step, held=self._ledger.held)
        self._activities.begin("evaluation", self._evaluate(self._role, step))

    async def _evaluate(self, role: EvaluationRole, step: int) -> Evaluation:
        began, config, kl = self._clock.now(), role.config, self._kl
        row = Evaluation(
            step=step, judge=role.judge.name, judge_was_reward=role.judge.was_reward, kl=kl
        )
        wanted = Wanted(
            prompts=role.prompts,
            samples=config.samples,
            draw=Draw(temperature=config.temperature, seed=role.seed),
            timeout_s=config.timeout_s,
        )
        try:
            sampled = await self._samplers.sample(wanted)
            row = _with_facts(row, sampled)
            judged = role.judge.judge(step, sampled.rollouts)
            row = _with_verdict(row, await _judged(judged, config.timeout_s))
        except AccordError as problem:
            row = replace(row, problem=str(problem))
        ended = self._clock.now()
        self._timeline.span("evaluation", f"step {step}", began, ended)
        row = replace(row, seconds=round(ended - began, 3))
        if config.keep_best and step > 0:
            kept = await self._saving.kept()
            return replace(row, best=kept and self._best.improves(row))
        return replace(row, best=self._best.improves(row))

    # -- what follows -----------------------------------------------------------------------------

    def after(self, task: asyncio.Task[Any], done: int) -> None:
        """It has ended; the run has done ``done`` steps."""
        assert self._role is not None
        role, row = self._role, task.result()
        self._current, self._last = None, row.step
        value = self._best.metric_of(row)
        if row.best and role.config.keep_best:
            assert value is not None
            row = replace(row, best=role.files.name_best(row.step, value))
        self._saving.decided()
        self._best.add(row)
        role.files.add(row)
        self._note(_numbers(row))
        self._event("evaluated", **_told(row))
        if done >= self._steps:
            self._want_if_due(role.config, done)
        elif self._best.hopeless and self.stopped is None:
            self._stop_early(role.config, done)

    def _stop_early(self, config: EvaluationConfig, done: int) -> None:
        best, since = self._best, self._best.since
        self.stopped = (
            f"{since} evaluations in a row were no better than that of step {best.step} "
            f"({config.metric} {best.value:.4g})"
        )
        self._event("early_stop", step=done, best_step=best.step, reason=self.stopped)
        self._ending.asked.set()


async def _judged(judged: Awaitable[Verdict], timeout_s: float) -> Verdict:
    try:
        return await within(timeout_s, judged)
    except TimeoutError:
        raise AccordError(f"the judge gave no scores within {timeout_s:.0f} s") from None


def _with_facts(row: Evaluation, sampled: Sampled) -> Evaluation:
    completions = [rollout.completion for rollout in sampled.rollouts]
    versions = [span.version for completion in completions for span in completion.versions]
    return replace(
        row,
        version_min=min(versions),
        version_max=max(versions),
        prompts=len({rollout.prompt.id for rollout in sampled.rollouts}),
        completions=len(completions),
        length=round(statistics.fmean(len(c.token_ids) for c in completions), 3),
        repeated=sampled.repeated,
    )


def _with_verdict(row: Evaluation, verdict: Verdict) -> Evaluation:
    return replace(
        row,
        score=verdict.score,
        win_rate=verdict.win_rate,
        ci_low=verdict.ci_low,
        ci_high=verdict.ci_high,
    )


def _numbers(row: Evaluation) -> dict[str, float]:
    """For the metrics; ``evaluation/step`` says of which step they are."""
    found = {
        "evaluation/step": row.step,
        "evaluation/score": row.score,
        "evaluation/win_rate": row.win_rate,
        "evaluation/ci_low": row.ci_low,
        "evaluation/ci_high": row.ci_high,
        "evaluation/kl": row.kl,
        "evaluation/length": row.length,
        "evaluation/seconds": row.seconds,
        "evaluation/repeated": row.repeated,
        "evaluation/failed": float(row.problem is not None),
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def _told(row: Evaluation) -> dict[str, Any]:
    names = ("step", "judge", "score", "win_rate", "ci_low", "ci_high", "kl", "length", "best")
    more = ("version_min", "version_max", "seconds", "repeated", "problem")
    return {name: getattr(row, name) for name in (*names, *more)}
