"""The batch of a step, its staleness, advantage, loss and KL penalty."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from cluster.contracts.config.base import (
    Option,
    Section,
)
from cluster.contracts.registry import ADVANTAGE_ESTIMATORS, POLICY_LOSSES


class BatchConfig(Section):
    prompts_per_step: int = Field(32, ge=1, description="Prompts that one learner step trains on.")
    samples_per_prompt: int = Field(
        4, ge=1, description="Completions sampled per prompt (the size of a group)."
    )
    steps: int = Field(100, ge=1, description="Learner steps of the run.")


class StalenessConfig(Section):
    bound: int = Field(
        2, ge=0, description="Most learner steps between sampling and training; 0: synchronous."
    )
    correction: Literal[
        "none", "decoupled", "token-tis", "sequence-tis", "token-mask", "sequence-mask"
    ] = Field(
        "decoupled",
        description="Importance weights of tokens sampled by older weights (docs/algorithms.md).",
    )
    cap: float = Field(5.0, gt=1, description="Upper limit of the importance weight.")
    floor: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Lower limit of the importance weight; with a -mask correction, what lies "
        "below it is left out as well (IcePop's two-sided mask).",
    )
    veto: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="A completion with any token whose ratio of probabilities, learner to engine, "
        "is below this is left out whole; 0: off, 1e-4 is usual.",
    )


class KLConfig(Section):
    coef: float = Field(0.05, ge=0, description="Weight of the per-token KL to the reference.")
    place: Literal["reward", "loss"] = Field(
        "reward",
        description="Where the KL term acts: taken off each token's reward, or added to the loss.",
    )
    estimator: Literal["k1", "k2", "k3", "k3+"] = Field(
        "k1", description="k1 belongs in the reward; in the loss use k2 or k3+ (its gradient)."
    )
    controller: Literal["fixed", "adaptive"] = Field(
        "fixed", description="fixed: coef stays; adaptive: coef follows `target`."
    )
    target: float = Field(6.0, gt=0, description="Adaptive: wanted KL, in nats per completion.")
    horizon: int = Field(
        10000, ge=1, description="Adaptive: completions over which a deviation is corrected."
    )


class AlgorithmConfig(Section):
    advantage: Annotated[str, AfterValidator(ADVANTAGE_ESTIMATORS.check)] = Field(
        "gae",
        description="How rewards become advantages. gae needs a value network (PPO); the others "
        "compare the completions of a group, or of the step.",
    )
    loss: Annotated[str, AfterValidator(POLICY_LOSSES.check)] = Field(
        "ppo", description="Policy loss; docs/algorithms.md has the formulas."
    )
    advantage_options: dict[str, Option] = Field(
        default_factory=dict, description="Options of a plugin's advantage estimator, by name."
    )
    loss_options: dict[str, Option] = Field(
        default_factory=dict, description="Options of a plugin's policy loss, by name."
    )
    gamma: float = Field(1.0, gt=0, le=1, description="Discount per token.")
    lam: float = Field(
        0.95, ge=0, le=1, description="GAE's λ: 0 trusts the value network, 1 the rewards."
    )
    clip_low: float | None = Field(
        None,
        gt=0,
        description="Ratio clipped below 1 - this; "
        "none: the loss's own (ppo 0.2, gspo 3e-4, cispo 1.0).",
    )
    clip_high: float | None = Field(
        None,
        gt=0,
        description="Ratio clipped above 1 + this; "
        "none: the loss's own (ppo 0.2, gspo 4e-4, cispo 0.28).",
    )
    dual_clip: float | None = Field(
        None, gt=1, description="ppo only: bound of the loss where the advantage is negative."
    )
    clip_value: float = Field(
        0.2, gt=0, description="Furthest that a value may move from its old estimate in the loss."
    )
    value_coef: float = Field(0.1, ge=0, description="Weight of the value loss.")
    entropy_coef: float = Field(
        0.0, ge=0, description="Weight of an entropy bonus, per token; 0: none."
    )
    whiten_advantages: bool = Field(
        True,
        description="gae and reinforce++: scale the advantages of a step to mean 0 and standard "
        "deviation 1.",
    )
    whiten_rewards: bool = Field(
        False, description="Scale the step's rewards to standard deviation 1, mean kept."
    )
    scale_by_std: bool = Field(True, description="GRPO: divide by the group's standard deviation.")
    aggregate: Literal[
        "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
    ] = Field(
        "token-mean",
        description="How token losses become one number: mean over all tokens; mean per "
        "completion, then over completions; sum per completion, then mean over completions; the "
        "same divided by rollout.max_tokens (Dr. GRPO).",
    )
    missing_eos_penalty: float = Field(
        0.0, ge=0, description="Taken off the score of a completion without an end token."
    )
    truncated: Literal["keep", "mask", "bootstrap"] = Field(
        "keep",
        description="Completions cut at max_tokens: trained as they are, left out of the loss, or "
        "continued with the value estimate (gae only).",
    )
    kl: KLConfig = KLConfig()
