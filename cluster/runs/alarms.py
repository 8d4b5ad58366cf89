"""Warnings drawn from the metrics of each step: pure, so that a table of numbers tests them.

A warning begins after ``patience`` steps in a row outside its limit and ends after as many well
inside it (hysteresis: a value that hovers around a limit is one episode, said once).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from cluster.contracts.config.alarms import AlarmsConfig

FIRST_STEPS = 5  # whose mean entropy is the start that later steps are compared with
REWARD_WINDOW = 10  # steps before a step, with whose scores it is compared
FEWEST_BEFORE = 3  # of them, or nothing is said of a jump
KL_PER_TOKEN, LEAST_KL = 0.2, 20.0  # nats: `alarms.kl_budget = "auto"`
EQUAL = 1e-12

Numbers = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class AlarmChange:
    """An alarm that begins or ends at ``step``. ``text``: what is wrong and what to do."""

    alarm: str
    change: Literal["start", "end"]
    step: int
    value: float
    limit: float
    text: str


@dataclass(frozen=True, slots=True)
class Reading:
    """One rule's view of a step. ``severity`` over 1: outside the limit; under ``calm``: inside."""

    value: float
    limit: float
    severity: float


@dataclass(frozen=True, slots=True)
class Rule:
    """``read`` gives None where the step lacks the metric: then nothing begins and nothing ends."""

    name: str
    read: Callable[[Numbers], Reading | None]
    text: Callable[[Reading], str]
    calm: float = 0.8  # severity under which a step counts towards the end
    patience: int | None = None  # None: that of the config


@dataclass(slots=True)
class _Episode:
    on: bool = False
    outside: int = 0
    inside: int = 0


class Watch:
    """Feed it every step in order. It keeps what the rules compare a step with."""

    def __init__(self, config: AlarmsConfig, *, samples_per_prompt: int = 2) -> None:
        """``samples_per_prompt``: of one completion nothing is equal or unequal."""
        self._config = config
        self._samples_per_prompt = samples_per_prompt
        self._entropies: list[float] = []
        self._scores: deque[tuple[float, float]] = deque(maxlen=REWARD_WINDOW)  # mean, deviation
        self._rules = self._made() if config.enabled else ()
        self._episodes = {rule.name: _Episode() for rule in self._rules}

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the alarms that are on."""
        return tuple(name for name, episode in self._episodes.items() if episode.on)

    def check(self, step: int, numbers: Numbers) -> list[AlarmChange]:
        """What begins or ends with the metrics of this step."""
        changes = []
        for rule in self._rules:
            reading = rule.read(numbers)
            if reading is None or not math.isfinite(reading.severity):
                continue
            change = self._advance(rule, reading)
            if change is not None:
                text = rule.text(reading) if change == "start" else _over(rule.name)
                changes.append(
                    AlarmChange(rule.name, change, step, reading.value, reading.limit, text)
                )
        self._remember(numbers)
        return changes

    def _advance(self, rule: Rule, reading: Reading) -> Literal["start", "end"] | None:
        episode = self._episodes[rule.name]
        episode.outside = episode.outside + 1 if reading.severity > 1 else 0
        episode.inside = episode.inside + 1 if reading.severity < rule.calm else 0
        if not episode.on and episode.outside >= (rule.patience or self._config.patience):
            episode.on = True
            return "start"
        if episode.on and episode.inside >= self._config.patience:
            episode.on = False
            return "end"
        return None

    def _remember(self, numbers: Numbers) -> None:
        entropy = numbers.get("policy/entropy")
        if entropy is not None and len(self._entropies) < FIRST_STEPS:
            self._entropies.append(entropy)
        if "objective/scores" in numbers and "rewards/std" in numbers:
            self._scores.append((numbers["objective/scores"], numbers["rewards/std"]))

    # -- the rules --------------------------------------------------------------------------------

    def _made(self) -> tuple[Rule, ...]:
        config = self._config
        made = (
            (config.constant_reward, Rule("constant-reward", self._constant, _constant_text)),
            (
                config.zero_std_frac if self._samples_per_prompt > 1 else 0.0,
                Rule("no-learning-signal", self._equal_groups, _signal_text),
            ),
            (config.entropy_share, Rule("entropy-collapse", self._entropy, self._entropy_text)),
            (config.kl_budget, Rule("kl-budget", self._kl, _kl_text)),
            # A shift of three standard deviations in a mean over a batch is no noise: said at once.
            (config.reward_jump, Rule("reward-jump", self._jump, self._jump_text, 0.5, 1)),
            (config.clipped_ratio, Rule("clipped-completions", self._clipped, _clipped_text)),
        )
        return tuple(rule for wanted, rule in made if wanted)

    def _constant(self, numbers: Numbers) -> Reading | None:
        """All scores equal, and equal to the step before: a step may hold a single completion."""
        low, high = numbers.get("rewards/min"), numbers.get("rewards/max")
        if low is None or high is None or not self._scores:
            return None
        apart = max(high, self._scores[-1][0]) - min(low, self._scores[-1][0])
        return Reading(high, 0.0, 2.0 if apart <= EQUAL * max(1.0, abs(high)) else 0.0)

    def _equal_groups(self, numbers: Numbers) -> Reading | None:
        share, limit = numbers.get("rewards/zero_std_frac"), self._config.zero_std_frac
        if share is None:
            return None
        constant = self._constant(numbers) if self._config.constant_reward else None
        if constant is not None and constant.severity > 1:
            return None  # the alarm about a constant reward says it better
        # At a limit of 1 the share can reach it but not exceed it.
        return Reading(share, limit, share / limit + EQUAL if share >= limit else share / limit)

    def _entropy(self, numbers: Numbers) -> Reading | None:
        entropy, share = numbers.get("policy/entropy"), self._config.entropy_share
        if entropy is None or len(self._entropies) < FIRST_STEPS:
            return None
        limit = share * statistics.fmean(self._entropies)
        return Reading(entropy, limit, limit / max(entropy, EQUAL)) if limit > 0 else None

    def _entropy_text(self, reading: Reading) -> str:
        began = statistics.fmean(self._entropies)
        return (
            f"The policy's entropy fell from {began:.2g} to {reading.value:.2g} nats per token: "
            "its completions become all alike. Lower learner.lr, raise algorithm.entropy_coef or "
            "algorithm.kl.coef, or go back to an earlier checkpoint."
        )

    def _kl(self, numbers: Numbers) -> Reading | None:
        kl, wanted = numbers.get("objective/kl"), self._config.kl_budget
        if kl is None:
            return None
        by_length = max(LEAST_KL, KL_PER_TOKEN * numbers.get("completions/mean_length", 0.0))
        budget = by_length if wanted == "auto" else float(wanted)
        return Reading(kl, budget, kl / budget)

    def _jump(self, numbers: Numbers) -> Reading | None:
        score, limit = numbers.get("objective/scores"), self._config.reward_jump
        deviation = numbers.get("rewards/std")
        if score is None or deviation is None or len(self._scores) < FEWEST_BEFORE:
            return None
        # The step's own deviation counts too: a first success among zeros is no jump.
        spread = max(deviation, statistics.fmean(d for _, d in self._scores))
        distance = abs(score - self._median())
        if spread <= EQUAL:  # two constants: any difference is a jump
            return Reading(score, limit, 0.0 if distance <= EQUAL else 2.0)
        return Reading(score, limit, distance / spread / limit)

    def _jump_text(self, reading: Reading) -> str:
        return (
            f"The mean score went from {self._median():.3g} to {reading.value:.3g} within a step: "
            "read samples of this step; the policy may have found a way around the reward, or the "
            "reward changed. Lower learner.lr if it is neither."
        )

    def _median(self) -> float:
        return statistics.median(score for score, _ in self._scores)

    def _clipped(self, numbers: Numbers) -> Reading | None:
        share, limit = numbers.get("completions/clipped_ratio"), self._config.clipped_ratio
        return None if share is None else Reading(share, limit, share / limit)


def _constant_text(reading: Reading) -> str:
    return (
        f"Every completion gets the score {reading.value:.3g}, so there is nothing to learn from. "
        "Read samples of the run and check the reward."
    )


def _signal_text(reading: Reading) -> str:
    return (
        f"In {reading.value:.0%} of the groups all completions have the same score, so those "
        "groups teach nothing. Use prompts of mixed difficulty, a finer reward or more "
        "batch.samples_per_prompt."
    )


def _kl_text(reading: Reading) -> str:
    return (
        f"The KL to the reference is {reading.value:.3g} nats per completion, over the budget of "
        f"{reading.limit:.3g}: the policy is far from where it started. Raise algorithm.kl.coef, "
        "lower learner.lr, or go back to an earlier checkpoint."
    )


def _clipped_text(reading: Reading) -> str:
    return (
        f"{reading.value:.0%} of the completions are cut at rollout.max_tokens before they end. "
        "Raise rollout.max_tokens, or set algorithm.missing_eos_penalty."
    )


def _over(name: str) -> str:
    return f"{name} is over: the metric is back within its limit."
