"""What the loop has to know of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.contracts.config.train import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    steps: int
    prompts_per_step: int
    samples_per_prompt: int
    staleness_bound: int
    staleness_lead: int | None = None  # steps ahead that groups are admitted; None: as measured
    workers: int
    checkpoint_every: int
    keep_checkpoints: int
    checkpoint_every_s: float | None = None  # by time, beside the number of steps
    stop_grace_s: float = 4.0
    autoscale: tuple[int, int] | None = None  # fewest and most workers of the policy; None: off
    stream_parts: int = 1  # of a step, each of which the learner may begin with when it is there
    max_learner_restarts: int = 3  # within ten minutes
    max_step_attempts: int = 3  # of one learner step whose rollouts were lost on the way


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    start_timeout_s: float
    stall_timeout_s: float
    weights_timeout_s: float
    max_restarts: int
    min_workers: int = 1  # with fewer the run waits,
    workers_timeout_s: float = 0.0  # at most so long; 0: for ever
    max_attempts: int = 3  # of scoring one group; lost workers do not count
    max_unrated_share: float = 0.05  # of all groups; some few are always borne
    harvest_s: float = 1.0  # at least; longer with hundreds of workers
    slots: int | None = None  # samples that a worker decodes at a time; None: not known

    @property
    def most_samples(self) -> int | None:
        """Samples to decode that a worker is given at most: half as many again as it decodes at a
        time, so that it has the next one at hand whenever one is finished."""
        return None if self.slots is None else self.slots + max(1, self.slots // 2)


def loop_settings(config: TrainConfig) -> LoopSettings:
    return LoopSettings(
        steps=config.batch.steps,
        prompts_per_step=config.batch.prompts_per_step,
        samples_per_prompt=config.batch.samples_per_prompt,
        staleness_bound=config.staleness.bound,
        staleness_lead=None if config.staleness.lead == "auto" else config.staleness.lead,
        workers=config.rollout.workers,
        checkpoint_every=config.checkpoint.every,
        checkpoint_every_s=config.checkpoint.every_s,
        keep_checkpoints=config.checkpoint.keep,
        autoscale=_autoscale(config),
        stream_parts=config.learner.stream_parts,
        max_learner_restarts=config.learner.max_restarts,
    )


def _autoscale(config: TrainConfig) -> tuple[int, int] | None:
    rollout = config.rollout
    if not rollout.autoscale or rollout.max_workers is None:
        return None
    return rollout.min_workers, rollout.max_workers


def pool_settings(config: TrainConfig) -> PoolSettings:
    return PoolSettings(
        start_timeout_s=config.rollout.start_timeout_s,
        stall_timeout_s=config.rollout.stall_timeout_s,
        weights_timeout_s=config.weights.timeout_s,
        max_restarts=config.rollout.max_restarts,
        min_workers=config.rollout.min_workers,
        workers_timeout_s=config.rollout.workers_timeout_s,
        max_unrated_share=config.reward.max_unrated_share,
        slots=config.rollout.max_running,
    )
