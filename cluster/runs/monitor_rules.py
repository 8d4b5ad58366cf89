"""The figures that monitors look at and when each is outside of its limit. Pure."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cluster.contracts.config.monitors import MonitorsConfig
from cluster.runs.monitor_gap import Gap, falling_while_rising
from cluster.runs.monitor_texts import TEXTS

FIRST_STEPS = 5  # whose mean is the start that later steps are compared with
REWARD_WINDOW = 10  # steps before a step, with whose scores it is compared
FEWEST_BEFORE = 3  # of them, or nothing is said of a jump
KL_PER_TOKEN, LEAST_KL = 0.2, 20.0  # nats: `monitors.kl_budget = "auto"`
EVALUATIONS_AT_ONCE = 2  # whose mean is compared with the best such mean
STEPS_AT_ONCE = 5  # likewise, of a judge that looks at each step
EQUAL = 1e-12

SCORE, ENTROPY = "objective/scores", "policy/entropy"
LENGTH, REFUSALS = "completions/mean_length", "completions/refusal_rate"
HELD_OUT = "evaluation/score"
DISAGREEMENT = "/disagreement/mean"

Numbers = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Reading:
    """One rule's view of a step. ``severity`` over 1: outside the limit; under ``calm``: inside.
    ``before``: what the value is compared with, where there is such a thing; ``since``: the step
    up to which all was well, where the figure itself tells."""

    value: float
    limit: float
    severity: float
    before: float = 0.0
    since: int | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """``read`` gives None where the step lacks the figure: then nothing begins and nothing ends."""

    name: str
    read: Callable[[Numbers], Reading | None]
    text: Callable[[Reading], str]
    calm: float = 0.8  # severity under which a step counts towards the end
    patience: int | None = None  # None: that of the config
    calm_patience: int | None = None


@dataclass(slots=True)
class Past:
    """What the steps before have shown. ``step``: the one that is looked at."""

    step: int = 0
    _first: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    scores: deque[tuple[float, float]] = field(  # mean, standard deviation
        default_factory=lambda: deque(maxlen=REWARD_WINDOW)
    )
    held_out: Gap = field(default_factory=lambda: Gap(EVALUATIONS_AT_ONCE))
    second: Gap = field(default_factory=lambda: Gap(STEPS_AT_ONCE))

    def beginning(self) -> Past:
        """Only what the run began with: it stays the measure after a rollback."""
        return Past(_first=self._first)

    def remember(self, numbers: Numbers) -> None:
        for name, value in numbers.items():
            compared = name in (ENTROPY, LENGTH, REFUSALS) or name.endswith(DISAGREEMENT)
            if compared and len(self._first[name]) < FIRST_STEPS:
                self._first[name].append(value)
        if SCORE in numbers and "rewards/std" in numbers:
            self.scores.append((numbers[SCORE], numbers["rewards/std"]))

    def start(self, name: str) -> float | None:
        """Its mean over the first steps; None before they are over."""
        values = self._first.get(name, [])
        return statistics.fmean(values) if len(values) >= FIRST_STEPS else None

    def median(self) -> float:
        return statistics.median(score for score, _ in self.scores)


def make_rules(config: MonitorsConfig, past: Past, samples_per_prompt: int) -> tuple[Rule, ...]:
    rules = _Rules(config, past)
    signal = config.zero_std_frac if samples_per_prompt > 1 else 0.0
    wanted: tuple[tuple[object, str, Callable[[Numbers], Reading | None]], ...] = (
        (config.constant_reward, "constant-reward", rules.constant),
        (signal, "no-learning-signal", rules.equal_groups),
        (config.entropy_share, "entropy-collapse", rules.entropy),
        (config.kl_budget, "kl-budget", rules.kl),
        (config.engine_mismatch, "engine-mismatch", rules.mismatch),
        (config.effective_samples, "effective-samples", rules.effective),
        (config.clipped_ratio, "clipped-completions", rules.clipped),
        (config.length_factor, "length-drift", rules.length),
        (config.repeated_share, "repetition", rules.repetition),
        (config.refusal_change, "refusals", rules.refusals),
        (config.disagreement_factor, "ensemble-disagreement", rules.disagreement),
    )
    made = [Rule(name, read, TEXTS[name]) for on, name, read in wanted if on]
    if config.reward_jump:
        # A shift of three standard deviations in a mean over a batch is no noise: said at once.
        made.append(Rule("reward-jump", rules.jump, TEXTS["reward-jump"], 0.5, 1))
    if config.held_out_gap:  # evaluations, not steps, are counted: they are few
        made.append(Rule("held-out-gap", rules.held_out, TEXTS["held-out-gap"], 0.5, 2, 2))
    if config.second_judge and config.second_judge_gap:
        made.append(Rule("second-judge-gap", rules.second_judge, TEXTS["second-judge-gap"], 0.5))
    return tuple(made)


@dataclass(frozen=True, slots=True)
class _Rules:
    config: MonitorsConfig
    past: Past

    def constant(self, numbers: Numbers) -> Reading | None:
        """All scores equal, and equal to the step before: a step may hold a single completion."""
        low, high = numbers.get("rewards/min"), numbers.get("rewards/max")
        if low is None or high is None or not self.past.scores:
            return None
        before = self.past.scores[-1][0]
        apart = max(high, before) - min(low, before)
        return Reading(high, 0.0, 2.0 if apart <= EQUAL * max(1.0, abs(high)) else 0.0)

    def equal_groups(self, numbers: Numbers) -> Reading | None:
        share, limit = numbers.get("rewards/zero_std_frac"), self.config.zero_std_frac
        if share is None:
            return None
        constant = self.constant(numbers) if self.config.constant_reward else None
        if constant is not None and constant.severity > 1:
            return None  # the alarm about a constant reward says it better
        # At a limit of 1 the share can reach it but not exceed it.
        return Reading(share, limit, share / limit + EQUAL if share >= limit else share / limit)

    def entropy(self, numbers: Numbers) -> Reading | None:
        entropy, start = numbers.get(ENTROPY), self.past.start(ENTROPY)
        if entropy is None or start is None:
            return None
        limit = self.config.entropy_share * start
        return Reading(entropy, limit, limit / max(entropy, EQUAL), start) if limit > 0 else None

    def kl(self, numbers: Numbers) -> Reading | None:
        kl, wanted = numbers.get("objective/kl"), self.config.kl_budget
        if kl is None:
            return None
        by_length = max(LEAST_KL, KL_PER_TOKEN * numbers.get(LENGTH, 0.0))
        budget = by_length if wanted == "auto" else float(wanted)
        return Reading(kl, budget, kl / budget)

    def mismatch(self, numbers: Numbers) -> Reading | None:
        """Steps without a token of the learner's own version say nothing."""
        found = numbers.get("sampling/mismatch_kl")
        # An estimate: it may be negative by chance, and an engine that is wrong may make it so.
        return _share(None if found is None else abs(found), self.config.engine_mismatch)

    def effective(self, numbers: Numbers) -> Reading | None:
        share, limit = numbers.get("async/ess"), self.config.effective_samples
        return None if share is None else Reading(share, limit, limit / max(share, EQUAL))

    def jump(self, numbers: Numbers) -> Reading | None:
        score, deviation = numbers.get(SCORE), numbers.get("rewards/std")
        if score is None or deviation is None or len(self.past.scores) < FEWEST_BEFORE:
            return None
        limit, median = self.config.reward_jump, self.past.median()
        # The step's own deviation counts too: a first success among zeros is no jump.
        spread = max(deviation, statistics.fmean(d for _, d in self.past.scores))
        distance = abs(score - median)
        if spread <= EQUAL:  # two constants: any difference is a jump
            return Reading(score, limit, 0.0 if distance <= EQUAL else 2.0, median)
        return Reading(score, limit, distance / spread / limit, median)

    def clipped(self, numbers: Numbers) -> Reading | None:
        return _share(numbers.get("completions/clipped_ratio"), self.config.clipped_ratio)

    def repetition(self, numbers: Numbers) -> Reading | None:
        return _share(numbers.get("completions/repeated_frac"), self.config.repeated_share)

    def length(self, numbers: Numbers) -> Reading | None:
        length, start = numbers.get(LENGTH), self.past.start(LENGTH)
        if length is None or start is None or not length > 0 < start:
            return None
        limit = self.config.length_factor
        return Reading(length, limit, max(length / start, start / length) / limit, start)

    def refusals(self, numbers: Numbers) -> Reading | None:
        share, start = numbers.get(REFUSALS), self.past.start(REFUSALS)
        if share is None or start is None:
            return None
        limit = self.config.refusal_change
        return Reading(share, limit, abs(share - start) / limit, start)

    def disagreement(self, numbers: Numbers) -> Reading | None:
        """Of the ensemble whose disagreement has grown most."""
        found = []
        for name, value in numbers.items():
            start = self.past.start(name) if name.endswith(DISAGREEMENT) else None
            if start is not None and start > EQUAL:
                limit = self.config.disagreement_factor
                found.append(Reading(value, limit * start, value / start / limit, start))
        return max(found, key=lambda reading: reading.severity, default=None)

    def held_out(self, numbers: Numbers) -> Reading | None:
        gap, limit = self.past.held_out, self.config.held_out_gap
        return self._gap(gap, numbers.get(HELD_OUT), numbers.get(SCORE), limit)

    def second_judge(self, numbers: Numbers) -> Reading | None:
        judged = numbers.get(f"rewards/{self.config.second_judge}/mean")
        if judged is None:
            return None
        limit = self.config.second_judge_gap
        return self._gap(self.past.second, judged, numbers.get(SCORE), limit)

    def _gap(
        self, gap: Gap, judged: float | None, reward: float | None, limit: float
    ) -> Reading | None:
        gap.add(self.past.step, judged, reward)
        fall = None if judged is None else falling_while_rising(gap)
        if fall is None:
            return None
        return Reading(fall.now, fall.best, fall.errors / limit, fall.best, fall.step)


def _share(share: float | None, limit: float) -> Reading | None:
    return None if share is None else Reading(share, limit, share / limit)
