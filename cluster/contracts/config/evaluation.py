"""`[evaluation]` of `accord train`: the policy is judged on held-out prompts while it trains."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cluster.contracts.config.base import Section
from cluster.contracts.config.reward import RewardConfig


class EvaluationConfig(Section):
    every: int = Field(
        0,
        ge=0,
        description="Learner steps between two evaluations. The last step is always evaluated. "
        "0: no evaluation while the policy trains.",
    )
    prompts: str = Field(
        "",
        description="File of held-out prompts, or `datasets:NAME`; read as `data.prompts` is. "
        "Prompts that are also in `data.prompts` are left out, and the run says how many.",
    )
    split: str = Field("test", description="Split of `datasets:NAME`.")
    max_prompts: int = Field(128, ge=1, description="Use only the first so many prompts.")
    samples: int = Field(1, ge=1, description="Completions per prompt.")
    temperature: float | None = Field(
        None,
        gt=0,
        description="Sampling temperature of the evaluation. none: `rollout.temperature`.",
    )
    judge: RewardConfig | None = Field(
        None,
        description="Scores the completions, in the command's own process; training should never "
        "have seen it. none: the run's own reward scores them, and the results say so.",
    )
    start: bool = Field(
        True,
        description="Evaluate the policy also before its first step. Its completions then are the "
        "baseline of the win rate.",
    )
    metric: Literal["score", "win_rate"] = Field(
        "score",
        description="By what the best step is chosen. score: mean score. win_rate: share of "
        "completions that beat the policy's own of the start.",
    )
    keep_best: bool = Field(
        True,
        description="Write a checkpoint at each evaluated step, and keep that of the best one "
        "beside the newest `checkpoint.keep`. best.json names it.",
    )
    result: Literal["last", "best"] = Field(
        "last", description="Which step's policy becomes `policy/` at the end of the run."
    )
    patience: int = Field(
        0,
        ge=0,
        description="End the run after so many evaluations in a row without a new best. 0: never.",
    )
    min_improvement: float = Field(
        0.0,
        ge=0,
        description="By how much `metric` must be over the best so far to count as a new best.",
    )
    timeout_s: float = Field(
        600,
        gt=0,
        description="An evaluation whose completions are not there after this many seconds, or not "
        "judged after as many again, is given up. Training goes on, and its row says why. A worker "
        "has a third of the time for its part, so that another one can take it over.",
    )

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        problems = []
        if self.every and not self.prompts:
            problems.append("evaluation.every needs held-out prompts: set evaluation.prompts")
        if self.metric == "win_rate" and not self.start:
            problems.append(
                "evaluation.metric = 'win_rate' compares with the policy's start: set "
                "evaluation.start = true"
            )
        if self.result == "best" and not self.keep_best:
            problems.append(
                "evaluation.result = 'best' needs its checkpoint: set evaluation.keep_best = true"
            )
        if self.result == "best" and not self.every:
            problems.append("evaluation.result = 'best' needs evaluations: set evaluation.every")
        if self.patience and not self.every:
            problems.append("evaluation.patience counts evaluations: set evaluation.every")
        if self.judge is not None and self.judge.address is not None:
            problems.append(
                "evaluation.judge runs in the command's own process: give its sources in place of "
                "evaluation.judge.address (a source of type 'grpc' reaches a service elsewhere)"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self
