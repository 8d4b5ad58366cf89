"""`accord evaluate`."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePath
from typing import Any

from pydantic import Field, field_validator, model_validator

from cluster.contracts.config.base import (
    ClusterConfig,
    ModelConfig,
    PluginFiles,
    RunConfig,
    Section,
)
from cluster.contracts.config.judge import HELPFUL, JudgeConfig
from cluster.contracts.config.reward import RewardConfig
from cluster.contracts.config.rollout import DataConfig, RolloutConfig
from cluster.contracts.config.safety import SafetyConfig

POLICY, BASELINE = "policy", "baseline"  # names of the two that are compared


class NamedPolicy(ModelConfig):
    name: str = Field(
        "", description="Its name in the ranking. Empty: the folder of the run or of the model."
    )


class PeopleConfig(Section):
    """People as the judge: through a preference store and `accord label`."""

    store: str = Field(
        description="Preference store (`*.db`) that the pairs are put into and that "
        "`accord label` serves. Made if it does not exist."
    )
    labels: int = Field(
        1, ge=1, le=20, description="Judgements that each pair gets, by different annotators."
    )
    wait: bool = Field(
        True,
        description="Wait until all pairs are judged; the command then holds no models and no Ray. "
        "false: end with code 75. Either way the same command goes on later without sampling "
        "again.",
    )


class EvaluateConfig(Section):
    """`accord evaluate`: completions of two or more policies for the same prompts, compared."""

    plugins: PluginFiles = Field(
        [], description="Python files that add kinds of reward; see docs/extend.md."
    )
    run: RunConfig = RunConfig()
    policy: ModelConfig | None = Field(
        None, description="The policy to judge, against `baseline`; in place of `policies`."
    )
    baseline: ModelConfig | None = Field(
        None,
        description="What `policy` is compared with. Beside `policies`: each of them is compared "
        "with it only, and not with the others.",
    )
    policies: list[NamedPolicy] = Field(
        default_factory=list,
        description="Policies to rank, as tables or as paths. Without `baseline`, every two of "
        "them are compared.",
    )
    data: DataConfig
    judge: RewardConfig | None = Field(
        None, description="Scores both; training should never have seen it."
    )
    ai_judge: JudgeConfig | None = Field(
        None,
        description="An AI judge in place of `judge`: it compares the two completions of each "
        "prompt in both orders, without being told which policy wrote which.",
    )
    people: PeopleConfig | None = Field(
        None,
        description="People in place of `judge`: they compare the pairs in a browser, without "
        "being told which policy wrote which completion.",
    )
    criteria: str = Field(
        HELPFUL, min_length=1, description="What the AI judge is told to prefer, in plain words."
    )
    safety: SafetyConfig | None = Field(
        None,
        description="Report how often the completions of both are harmful or refuse, by these "
        "rules and this classifier; for prompts that try to provoke harm.",
    )
    samples: int = Field(1, ge=1, description="Completions per prompt.")
    turns: int = Field(
        1,
        ge=1,
        description="Turns of each question that are asked and judged. More than 1 is for sets "
        "whose questions have several turns, such as MT-Bench.",
    )
    max_prompts: int | None = Field(
        None, ge=1, description="Use only the first so many prompts. none: all."
    )
    tie_margin: float = Field(
        0.0, ge=0, description="Scores that differ by less than this are a tie."
    )
    rollout: RolloutConfig = RolloutConfig()
    cluster: ClusterConfig = ClusterConfig()

    @field_validator("policies", mode="before")
    @classmethod
    def _paths(cls, given: Any) -> Any:
        if not isinstance(given, list):
            return given
        return [{"path": one} if isinstance(one, str) else one for one in given]

    @model_validator(mode="after")
    def _check(self) -> EvaluateConfig:
        if sum(one is not None for one in (self.judge, self.ai_judge, self.people)) != 1:
            raise ValueError(
                "give one of judge (rewards), ai_judge (a model that compares) and people"
            )
        if self.policies and self.policy is not None:
            raise ValueError("give policy and baseline, or policies, not both")
        if not self.policies and (self.policy is None or self.baseline is None):
            raise ValueError("give policy and baseline, or policies")
        if self.policies and len(self.policies) + (self.baseline is not None) == 1:
            raise ValueError("one policy alone cannot be compared: give a second one")
        names = Counter(one.name or name_of(one.path) for one in self.policies)
        if self.policies and self.baseline is not None:
            names[BASELINE] += 1
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise ValueError(f"two policies are called {twice[0]!r}: give each its own `name`")
        return self

    @property
    def contestants(self) -> dict[str, ModelConfig]:
        """What is compared, by name; the baseline is the last one."""
        if self.policy is not None and self.baseline is not None:
            return {POLICY: self.policy, BASELINE: self.baseline}
        found: dict[str, ModelConfig] = {
            one.name or name_of(one.path): one for one in self.policies
        }
        return found if self.baseline is None else {**found, BASELINE: self.baseline}


def name_of(path: str) -> str:
    """Of a policy in a run directory, the run's name: runs/NAME/policy. Of a checkpoint's, its
    run and step."""
    parts = [part for part in PurePath(path).parts if part != "checkpoints"]
    if len(parts) > 1 and parts[-1] == "policy":
        parts = parts[:-1]
    if len(parts) > 1 and parts[-1].startswith("step-"):
        return "/".join(parts[-2:])
    return parts[-1] if parts else path
