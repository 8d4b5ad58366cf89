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
    prompts_per_step: int = Field(
        32, ge=1, description="Number of prompts that one learner step trains on."
    )
    samples_per_prompt: int = Field(
        4, ge=1, description="Completions sampled per prompt (the size of a group)."
    )
    steps: int = Field(100, ge=1, description="Number of learner steps of the run.")


class StalenessConfig(Section):
    bound: int = Field(
        2,
        ge=0,
        description="Most learner steps between sampling a token and training on it. 0: "
        "synchronous.",
    )
    lead: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="How many learner steps ahead of its own step a group is admitted, at most "
        "`staleness.bound`. auto: as late as the measured times allow, so that completions are as "
        "fresh as they can be without the learner waiting.",
    )
    correction: Literal[
        "none", "decoupled", "token-tis", "sequence-tis", "token-mask", "sequence-mask"
    ] = Field(
        "decoupled",
        description="Importance weights for tokens that older weights sampled "
        "(docs/algorithms.md).",
    )
    cap: float = Field(
        5.0,
        gt=1,
        description="Upper limit of the importance weight. The mask corrections leave out what "
        "lies above it, the others clip to it.",
    )
    floor: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Lower limit of the importance weight. The mask corrections leave out what "
        "lies below it (IcePop), the others clip to it.",
    )
    veto: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Leave out a whole completion if the probability ratio of any of its "
        "tokens, learner over engine, is below this. 0: off. 1e-4 is usual.",
    )


class KLConfig(Section):
    coef: float = Field(0.05, ge=0, description="Weight of the per-token KL to the reference.")
    place: Literal["reward", "loss"] = Field(
        "reward",
        description="reward: the KL is subtracted from each token's reward. loss: it is added "
        "to the loss.",
    )
    estimator: Literal["k1", "k2", "k3", "k3+"] = Field(
        "k1",
        description="Per-token estimate of the KL. In the reward: k1 only. In the loss: k2 or "
        "k3+, which have the gradient of the KL, or k3.",
    )
    controller: Literal["fixed", "adaptive"] = Field(
        "fixed",
        description="fixed: `coef` stays. adaptive: `coef` changes until the KL is at `target`.",
    )
    target: float = Field(
        6.0, gt=0, description="adaptive only: the KL to aim at, in nats per completion."
    )
    horizon: int = Field(
        10000, ge=1, description="adaptive only: completions over which a deviation is corrected."
    )


class AlgorithmConfig(Section):
    advantage: Annotated[str, AfterValidator(ADVANTAGE_ESTIMATORS.check)] = Field(
        "gae",
        description="How rewards become advantages. gae (PPO) needs a value network. The others "
        "compare the completions of a group, or of the step.",
    )
    loss: Annotated[str, AfterValidator(POLICY_LOSSES.check)] = Field(
        "ppo", description="Policy loss (docs/algorithms.md has the formulas)."
    )
    advantage_options: dict[str, Option] = Field(
        default_factory=dict, description="Options of a plugin's advantage estimator, by name."
    )
    loss_options: dict[str, Option] = Field(
        default_factory=dict, description="Options of a plugin's policy loss, by name."
    )
    gamma: float = Field(1.0, gt=0, le=1, description="Discount per token.")
    lam: float = Field(
        0.95, ge=0, le=1, description="GAE's λ. 0: trust the value network. 1: trust the rewards."
    )
    clip_low: float | None = Field(
        None,
        gt=0,
        description="The loss clips the ratio below 1 - `clip_low`. none: the loss's own value "
        "(ppo 0.2, gspo 3e-4, cispo 1.0).",
    )
    clip_high: float | None = Field(
        None,
        gt=0,
        description="The loss clips the ratio above 1 + `clip_high`. none: the loss's own value "
        "(ppo 0.2, gspo 4e-4, cispo 0.28).",
    )
    dual_clip: float | None = Field(
        None,
        gt=1,
        description="ppo only: the constant c of dual-clip PPO. A token of negative advantage A "
        "has at most the loss -c A. none: off.",
    )
    clip_value: float = Field(
        0.2, gt=0, description="The value loss clips how far a value moves from its old estimate."
    )
    value_coef: float = Field(0.1, ge=0, description="Weight of the value loss.")
    entropy_coef: float = Field(0.0, ge=0, description="Weight of an entropy bonus per token.")
    whiten_advantages: bool = Field(
        True,
        description="gae, reinforce++ and reinforce-baseline: scale the advantages of a "
        "step to mean 0 and standard deviation 1.",
    )
    whiten_rewards: bool = Field(
        False,
        description="Divide the token rewards by their standard deviation over the step. Their "
        "mean stays.",
    )
    scale_by_std: bool = Field(
        True, description="grpo only: divide by the group's standard deviation."
    )
    aggregate: Literal[
        "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
    ] = Field(
        "token-mean",
        description="How token losses become one number. token-mean: mean over all tokens. "
        "seq-mean-token-mean: mean per completion, then mean over completions. "
        "seq-mean-token-sum: sum per completion, then mean over completions. "
        "seq-mean-token-sum-norm: the same divided by `rollout.max_tokens` (Dr. "
        "GRPO).",
    )
    missing_eos_penalty: float = Field(
        0.0,
        ge=0,
        description="Subtracted from the score of a completion that is cut at "
        "`rollout.max_tokens`.",
    )
    truncated: Literal["keep", "mask", "bootstrap"] = Field(
        "keep",
        description="What happens to completions cut at `rollout.max_tokens`. keep: trained "
        "like the others. mask: left out of the loss. bootstrap (gae only): the "
        "value after the last token replaces the score.",
    )
    kl: KLConfig = KLConfig()
