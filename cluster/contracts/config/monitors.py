"""What watches a training run for a reward that is gamed, and what then happens.

A monitor is a figure of the run, a limit and an action. It raises an alarm when its figure leaves
the limit. The defaults only warn.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cluster.contracts.config.base import Section

Action = Literal["warn", "raise_kl", "pause", "stop", "rollback"]


def _action(figure: str) -> Action:
    action: Action = Field("warn", description=f"What follows when {figure}.")
    return action


class ActionsConfig(Section):
    """Of each monitor, by its name. warn: an alarm is written. raise_kl: the KL coefficient is
    raised. pause: as `accord pause`. stop: the run ends with the best checkpoint's policy.
    rollback: the run goes on from the best checkpoint with a higher KL coefficient."""

    held_out_gap: Action = _action("the held-out score falls while the training reward rises")
    second_judge_gap: Action = _action("the second judge's score falls while the reward rises")
    ensemble_disagreement: Action = _action("the reward models of an ensemble disagree more")
    kl_budget: Action = _action("the KL to the reference is over its budget")
    length_drift: Action = _action("completions become much longer or shorter")
    clipped_completions: Action = _action("completions are cut at `rollout.max_tokens`")
    repetition: Action = _action("completions repeat themselves")
    refusals: Action = _action("the share of refusals changes")
    entropy_collapse: Action = _action("the policy's entropy falls")
    engine_mismatch: Action = _action(
        "engine and learner disagree about the probabilities of fresh tokens"
    )
    effective_samples: Action = _action("few tokens carry the weight of a step")
    reward_jump: Action = _action("the mean score jumps")
    constant_reward: Action = _action("all scores are equal")
    no_learning_signal: Action = _action("most groups have equal scores")

    @property
    def acting(self) -> dict[str, Action]:
        """By the name of the monitor, those that do more than warn."""
        found: dict[str, Action] = self.model_dump()
        return {name.replace("_", "-"): act for name, act in found.items() if act != "warn"}


class MonitorsConfig(Section):
    enabled: bool = Field(True, description="Watch the run. false: nothing warns and nothing acts.")
    patience: int = Field(
        3,
        ge=1,
        description="Steps in a row outside a limit before an alarm begins, and inside it before "
        "the alarm ends.",
    )
    held_out_gap: float = Field(
        2.5,
        ge=0,
        description="Alarm when the held-out score (`[evaluation]`) has fallen from its best by "
        "more than this many standard errors, at two evaluations in a row, while the training "
        "reward rose. 0: off.",
    )
    second_judge: str = Field(
        "",
        description="Name of one of `reward.sources` (its weight may be 0) that judges the same "
        "completions by another standard. Empty: none.",
    )
    second_judge_gap: float = Field(
        2.5,
        ge=0,
        description="Alarm when the second judge's mean score has fallen from its best by more "
        "than this many standard errors while the training reward rose. 0: off.",
    )
    disagreement_factor: float = Field(
        2.0,
        ge=0,
        description="Alarm when the members of a reward-model ensemble disagree more than this "
        "many times as much as over the first five steps. 0: off.",
    )
    zero_std_frac: float = Field(
        0.9,
        ge=0,
        le=1,
        description="No learning signal: alarm when this share of the groups has equal scores. "
        "0: off.",
    )
    entropy_share: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="Entropy collapse: alarm when the entropy falls below this share of what it "
        "was over the first five steps. 0: off.",
    )
    kl_budget: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="Alarm when the KL to the reference is over this many nats per completion. "
        "auto: 0.2 per token of the mean completion, at least 20. 0: off.",
    )
    engine_mismatch: float = Field(
        0.1,
        ge=0,
        description="Alarm when the KL between what the engine sampled from and what the learner "
        "computes with the same weights (`sampling/mismatch_kl`) is over this many nats per token. "
        "An engine in 8 bits needs it most. 0: off.",
    )
    effective_samples: float = Field(
        0.3,
        ge=0,
        lt=1,
        description="Alarm when the effective share of a step's tokens (`async/ess`) is under "
        "this: a few tokens then carry most of its weight. 0: off.",
    )
    reward_jump: float = Field(
        3.0,
        ge=0,
        description="Alarm when the mean score of a step differs from the median of the ten steps "
        "before by more than this many standard deviations of the scores. 0: off.",
    )
    constant_reward: bool = Field(
        True, description="Alarm when all completions of a step have the same score."
    )
    length_factor: float = Field(
        2.0,
        ge=0,
        description="Alarm when completions are this many times as long, or as short, as over the "
        "first five steps. 0: off.",
    )
    clipped_ratio: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Alarm when more than this share of the completions is cut at "
        "`rollout.max_tokens`. 0: off.",
    )
    repeated_share: float = Field(
        0.3,
        ge=0,
        le=1,
        description="Alarm when more than this share of the sequences of four tokens has occurred "
        "before in the same completion. 0: off.",
    )
    refusal_change: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Alarm when the share of completions that refuse (English phrases) differs "
        "from the share over the first five steps by more than this. 0: off.",
    )
    kl_factor: float = Field(
        2.0, gt=1, description="raise_kl and rollback: the KL coefficient is multiplied by this."
    )
    kl_least: float = Field(
        0.02,
        gt=0,
        description="raise_kl and rollback: the coefficient that a raise leads to at least, also "
        "from 0.",
    )
    kl_most: float = Field(
        1.0, gt=0, description="raise_kl and rollback: the KL coefficient is never raised above."
    )
    again_after: int = Field(
        20,
        ge=1,
        description="raise_kl: steps after which the coefficient is raised again while the alarm "
        "goes on.",
    )
    max_rollbacks: int = Field(
        2, ge=1, description="rollback: most of them in a run. The next one stops the run instead."
    )
    actions: ActionsConfig = ActionsConfig()

    @model_validator(mode="after")
    def _bounds(self) -> MonitorsConfig:
        if self.kl_least > self.kl_most:
            raise ValueError("kl_least is over kl_most: lower it or raise kl_most")
        return self

    @property
    def acting(self) -> dict[str, Action]:
        """By name, the monitors that do more than warn."""
        return self.actions.acting if self.enabled else {}

    def acting_line(self) -> str:
        """For the start of a run and its plan; empty where monitors only warn."""
        acting = [f"{name} ({action})" for name, action in self.acting.items()]
        return f"monitors that act: {', '.join(acting)}" if acting else ""

    @property
    def moves_kl(self) -> bool:
        """Whether a monitor may raise the KL coefficient, so that a reference is needed."""
        return any(action in ("raise_kl", "rollback") for action in self.acting.values())

    def raised_kl(self, coefficient: float) -> float:
        """What the coefficient becomes."""
        raised = max(coefficient * self.kl_factor, self.kl_least)
        # One that a person set above the bound stays.
        return max(coefficient, min(raised, self.kl_most))
