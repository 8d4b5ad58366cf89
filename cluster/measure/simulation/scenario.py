"""What is simulated: workers, answers, losses, the learner. Seconds and tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cluster.measure.step_time import StepPrediction, StepTimes, predict

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One pipeline. The defaults are a large run: 4096 workers of 64 slots decode a quarter of a
    million answers at a time, 30 tokens a second each, cut at 12288 tokens (5000 on average).

    tokens_per_s: of one answer, while the worker's ``slots`` are full (taken as the same when they
    are not: decoding bound by memory traffic). length_cv: standard deviation over mean of the
    lognormal answer lengths, which are cut at max_tokens. lengths: recorded ones to draw from
    instead. speed_cv: of a worker's speed. stragglers: share of workers that are straggler_factor
    times slower. churn_per_hour: share of the workers lost in an hour, each back restart_s later
    with weights to load. learn_*_s: the learner's time is their sum. lead: steps ahead
    that groups are admitted; -1: as measured. publish_s: from the end of the learner's computing
    until the weights can be fetched, the learner standing still. fetch_s: fetching and verifying
    beside generation, pause_s: the swap, with generation standing still. score_s: from an answer's
    end until its group can be handed over.
    """

    workers: int = 4096
    slots: int = 64
    tokens_per_s: float = 30.0
    length_mean: float = 6000.0
    length_cv: float = 1.0
    max_tokens: int = 12_288
    lengths: tuple[float, ...] = ()
    speed_cv: float = 0.05
    stragglers: float = 0.01
    straggler_factor: float = 1.5
    churn_per_hour: float = 0.01
    restart_s: float = 120.0
    prompts_per_step: int = 16_384
    samples_per_prompt: int = 16
    bound: int = 8
    lead: int = -1
    learn_step_s: float = 0.0
    learn_sample_s: float = 0.0
    learn_token_s: float = 0.0
    publish_s: float = 1.0
    fetch_s: float = 5.0
    pause_s: float = 0.05
    score_s: float = 1.0
    seconds: float = 5400.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("workers", "slots", "max_tokens", "prompts_per_step", "samples_per_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} has to be at least 1")
        for name in ("tokens_per_s", "length_mean", "straggler_factor", "seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} has to be over 0")
        if not 0 <= self.stragglers <= 1:
            raise ValueError("stragglers is a share, 0 to 1")
        for name in ("length_cv", "speed_cv", "churn_per_hour", "restart_s", "bound"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} cannot be negative")

    @property
    def samples_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    def with_learner_share(self, share: float) -> Scenario:
        """A learner that takes ``share`` of the time that generating a step takes."""
        mean = draw_lengths(self, 200_000, 0).mean()
        per_token = share * self.generate_s() / (self.samples_per_step * mean)
        return replace(self, learn_step_s=0.0, learn_sample_s=0.0, learn_token_s=float(per_token))

    def with_workers(self, workers: int) -> Scenario:
        """Everything in proportion: as many more prompts a step, and a learner as much faster.

        The step time should then stay as it is; what it grows by is what scaling costs.
        """
        times = workers / self.workers
        prompts = max(1, round(self.prompts_per_step * times))
        return replace(
            self,
            workers=workers,
            prompts_per_step=prompts,
            learn_sample_s=self.learn_sample_s * self.prompts_per_step / prompts,
            learn_token_s=self.learn_token_s * self.prompts_per_step / prompts,
        )

    def mean_speed(self) -> float:
        """Of the workers, stragglers among them, relative to a worker of speed 1."""
        return 1.0 - self.stragglers * (1.0 - 1.0 / self.straggler_factor)

    def generate_s(self) -> float:
        """Seconds all slots together need for the tokens of a step."""
        tokens = self.samples_per_step * float(draw_lengths(self, 200_000, 0).mean())
        return tokens / (self.workers * self.slots * self.tokens_per_s * self.mean_speed())

    def learn_s(self) -> float:
        tokens = self.samples_per_step * float(draw_lengths(self, 200_000, 0).mean())
        return (
            self.learn_step_s
            + self.learn_sample_s * self.samples_per_step
            + self.learn_token_s * tokens
        )

    def prediction(self, *, longest: bool) -> StepPrediction:
        """The step-time model of ``cluster.measure.step_time``.

        ``longest``: a step trains on exactly its own groups, so its last answer counts, not the
        mean one. The longest answer among those of a step then takes the mean one's place.
        """
        lengths = draw_lengths(self, 200_000, 0)
        length = float(lengths.mean())
        if longest:
            share = 1.0 - 1.0 / min(self.samples_per_step, len(lengths))
            length = float(np.quantile(lengths, share))
        times = StepTimes(
            generate_s=self.generate_s(),
            learn_s=self.learn_s() + self.publish_s,
            sample_s=length / self.tokens_per_s,
            publish_s=self.fetch_s + self.pause_s,
            score_s=self.score_s,
            generation_stall_s=self.pause_s,
        )
        return predict(times, self.bound)


def draw_lengths(scenario: Scenario, count: int, *stream: int) -> Floats:
    """``count`` answer lengths in tokens, at least 1; a stream of numbers for each ``stream``."""
    rng = np.random.default_rng([scenario.seed, 1, *stream])
    if scenario.lengths:
        return rng.choice(np.asarray(scenario.lengths, dtype=np.float64), size=count)
    sigma = math.sqrt(math.log1p(scenario.length_cv**2))
    mu = math.log(scenario.length_mean) - sigma**2 / 2
    return np.clip(np.round(rng.lognormal(mu, sigma, count)), 1, scenario.max_tokens)


class Lengths:
    """Answer lengths by group: they do not depend on who answers, or when. A group that is asked
    for again, because its worker was lost, is answered anew."""

    BLOCK = 1024
    KEPT = 256

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._blocks: dict[int, list[list[float]]] = {}

    def of(self, group_id: int, attempt: int) -> list[float]:
        samples = self._scenario.samples_per_prompt
        if attempt:
            again: list[float] = draw_lengths(
                self._scenario, samples, 2, group_id, attempt
            ).tolist()
            return again
        number, place = divmod(group_id, self.BLOCK)
        block = self._blocks.get(number)
        if block is None:
            drawn = draw_lengths(self._scenario, self.BLOCK * samples, 1, number)
            block = drawn.reshape(self.BLOCK, samples).tolist()
            self._blocks[number] = block
            if len(self._blocks) > self.KEPT:
                del self._blocks[next(iter(self._blocks))]
        return block[place]


def worker_speed(scenario: Scenario, index: int, incarnation: int) -> tuple[float, float]:
    """(speed relative to 1, seconds it lives; infinite without churn)."""
    rng = np.random.default_rng([scenario.seed, 3, index, incarnation])
    sigma = math.sqrt(math.log1p(scenario.speed_cv**2))
    speed = float(rng.lognormal(-(sigma**2) / 2, sigma))
    if rng.random() < scenario.stragglers:
        speed /= scenario.straggler_factor
    rate = scenario.churn_per_hour / 3600.0
    return speed, float(rng.exponential(1.0 / rate)) if rate > 0 else math.inf
