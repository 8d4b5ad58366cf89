"""Where rewards come from."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from cluster.contracts.config.base import (
    Address,
    DType,
    Labels,
    Resources,
    Section,
    auto,
    labels,
    resources,
)
from cluster.contracts.config.judge import JudgeConfig
from cluster.contracts.config.safety import SafetyConfig
from cluster.contracts.registry import REWARD_KINDS, RewardKind


def _constraint() -> Any:
    return Field(
        None,
        description="Makes this reward a constraint: it adds nothing from this value on, and below "
        "it `weight` times what is missing is subtracted. none: off.",
    )


def _policies() -> Any:
    return Field(
        (),
        description="Names of `[[policies]]`: this reward scores their completions alone. Empty: "
        "those of all.",
    )


class RewardModelSource(Section):
    type: Literal["model"] = Field("model", description="A trained reward model.")
    path: str = Field(description="A reward-model directory made by `accord reward-model`.")
    weight: float = Field(1.0, description="Factor of this reward in the weighted sum.")
    name: str = Field("model", description="Name in metrics and reports.")
    normalise: bool = Field(
        True,
        description="Subtract the mean and divide by the standard deviation stored with the "
        "reward model.",
    )
    combine: Literal["mean", "minimum", "uncertainty"] = Field(
        "mean",
        description="How an ensemble's scores become one. uncertainty: mean less "
        "`uncertainty_coef` standard deviations of the members.",
    )
    uncertainty_coef: float = Field(
        1.0, ge=0, description="Weight of the members' standard deviation."
    )
    at_least: float | None = _constraint()
    policies: tuple[str, ...] = _policies()


class FunctionSource(Section):
    type: Literal["function"] = Field("function", description="A Python function of yours.")
    path: str = Field(
        description="`FILE.py:FUNCTION`. The function gets the lists `prompts`, `completions` "
        "and each metadata column by keyword. It returns one number per completion. "
        "In the stored config of a run started from Python: the file that holds the "
        "function."
    )
    weight: float = Field(1.0, description="Factor of this reward in the weighted sum.")
    name: str = Field("function", description="Name in metrics and reports.")
    at_least: float | None = _constraint()
    policies: tuple[str, ...] = _policies()


class RulesSource(Section):
    type: Literal["rules"] = Field(
        "rules", description="Rules on the text. The reward is 0, less 1 for each broken rule."
    )
    min_words: int | None = Field(None, description="Fewest words of a completion.")
    max_words: int | None = Field(None, description="Most words of a completion.")
    required: list[str] = Field(
        default_factory=list, description="Regular expressions that must be found in a completion."
    )
    forbidden: list[str] = Field(
        default_factory=list,
        description="Regular expressions that must not be found in a completion.",
    )
    repetition: bool = Field(False, description="Also subtract the share of repeated 3-grams.")
    weight: float = Field(1.0, description="Factor of this reward in the weighted sum.")
    name: str = Field("rules", description="Name in metrics and reports.")
    at_least: float | None = _constraint()
    policies: tuple[str, ...] = _policies()


class TlsSection(Section):
    """PEM files with which a client reaches a service that encrypts. They are read where the
    command runs; no other host needs them."""

    ca: str | None = Field(
        None,
        description="PEM file of the authority that signed the service's certificate. none: those "
        "the system trusts.",
    )
    cert: str | None = Field(
        None,
        description="PEM file of a client certificate, for a service that asks for one (mTLS).",
    )
    key: str | None = Field(
        None, description="PEM file of the client certificate's key. Only its owner may read it."
    )


class GrpcSource(Section):
    type: Literal["grpc"] = Field("grpc", description="A reward service that runs elsewhere.")
    address: Address = Field(description="HOST:PORT of a service that speaks accord.reward.v1.")
    token_env: str | None = Field(
        None,
        description="Environment variable that holds the bearer token the service asks for. none: "
        "no token is sent.",
    )
    tls: TlsSection | None = Field(
        None,
        description="Reach the service encrypted. An empty table is enough for a service "
        "whose certificate the system trusts. none: in clear.",
    )
    weight: float = Field(1.0, description="Factor of this reward in the weighted sum.")
    name: str = Field("grpc", description="Name in metrics and reports.")
    at_least: float | None = _constraint()
    policies: tuple[str, ...] = _policies()


class JudgeSource(JudgeConfig):
    type: Literal["judge"] = Field(
        "judge", description="An AI judge that rates each completion from 1 to 10."
    )
    rubric: str = Field(
        min_length=1, description="What the judge rates by, in plain words: what earns 10, what 1."
    )
    weight: float = Field(1.0, description="Factor of this reward in the weighted sum.")
    name: str = Field("judge", description="Name in metrics and reports.")
    at_least: float | None = _constraint()
    policies: tuple[str, ...] = _policies()

    @model_validator(mode="after")
    def _check_source(self) -> JudgeSource:
        if self.engine != "openai":
            raise ValueError(
                "a reward of type 'judge' asks an endpoint: serve the model with `vllm serve` and "
                "set base_url"
            )
        return self


class SafetySource(SafetyConfig):
    type: Literal["safety"] = Field(
        "safety",
        description="The safety layer. The reward is 0, less the penalties of all hits; a veto "
        "gets `veto_score`.",
    )
    weight: float = Field(1.0, description="Factor of this reward in the weighted sum.")
    name: str = Field("safety", description="Name in metrics and reports.")
    at_least: float | None = _constraint()
    policies: tuple[str, ...] = _policies()


BUILT_IN = (
    RewardModelSource,
    FunctionSource,
    RulesSource,
    GrpcSource,
    JudgeSource,
    SafetySource,
)
for _section in BUILT_IN:
    REWARD_KINDS.add_built_in(_section.model_fields["type"].default, RewardKind())


class PluginSource(Section):
    """A kind of reward that a plugin file adds; further keys are the kind's own options."""

    model_config = ConfigDict(extra="allow")

    type: Annotated[str, AfterValidator(REWARD_KINDS.check)] = Field(
        description="The name that the plugin file registers. Further keys are the plugin's own."
    )
    weight: float = Field(1.0, description="Factor of this reward in the weighted sum.")
    name: str = Field("plugin", description="Name in metrics and reports.")
    at_least: float | None = _constraint()
    policies: tuple[str, ...] = _policies()

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _check(self) -> PluginSource:
        kind = REWARD_KINDS[self.type]
        for key in self.options:
            if key not in kind.options:
                near = difflib.get_close_matches(key, kind.options, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"valid: {', '.join(kind.options)}"
                raise ValueError(f"a reward of kind {self.type!r} has no key {key}: {hint}")
        missing = [key for key in kind.required if key not in self.options]
        if missing:
            raise ValueError(f"a reward of kind {self.type!r} needs the key {missing[0]}")
        return self


def _kind(source: Any) -> str | None:
    """Which of the sections below reads this source."""
    word = source.get("type") if isinstance(source, dict) else getattr(source, "type", None)
    if word is None:
        return None
    return word if word in REWARD_KINDS and not REWARD_KINDS.origin(word) else "plugin"


RewardSource = Annotated[
    Annotated[RewardModelSource, Tag("model")]
    | Annotated[FunctionSource, Tag("function")]
    | Annotated[RulesSource, Tag("rules")]
    | Annotated[GrpcSource, Tag("grpc")]
    | Annotated[JudgeSource, Tag("judge")]
    | Annotated[SafetySource, Tag("safety")]
    | Annotated[PluginSource, Tag("plugin")],
    Discriminator(
        _kind,
        custom_error_type="no_type",
        custom_error_message="a reward source needs a type: "
        + ", ".join(f"'{word}'" for word in REWARD_KINDS),
    ),
]


def is_learnt_from(source: Mapping[str, Any], combine: str = "sum") -> bool:
    """Whether a policy learns from this source of its reward. One of weight 0 in a sum only
    judges."""
    return source.get("weight", 1.0) != 0 or combine != "sum"


class RewardConfig(Section):
    sources: list[RewardSource] = Field(
        min_length=1,
        description="Where rewards come from. Their weighted sum is the score, unless `combine` "
        "says otherwise.",
    )
    combine: Literal["sum", "minimum"] = Field(
        "sum",
        description="sum: weighted sum of the rewards. minimum: the smallest of the weighted "
        "rewards, so that none can make up for another. Constraints (`at_least`) are added to "
        "either.",
    )
    deadline_s: float = Field(
        30,
        gt=0,
        description="A scoring call that takes longer than this many seconds, retries included, "
        "fails.",
    )
    outage_s: float = Field(
        300,
        ge=0,
        description="While the reward service does not answer, finished completions are kept and "
        "scored when it does. After this many seconds the run writes a checkpoint and ends with "
        "exit code 75.",
    )
    max_unrated_share: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="A group is left out if a scorer has no score for one of its completions (an "
        "AI judge whose answers hold no rating). The run ends when there are more than 8 such "
        "groups and more than this share of all.",
    )
    max_batch: int = Field(64, ge=1, description="Most completions in one scoring batch.")
    max_wait_ms: float = Field(
        5, ge=0, description="Most milliseconds that a scoring batch waits for further completions."
    )
    clip: float | None = Field(None, gt=0, description="Clip the score to ±`clip`. none: off.")
    address: Address | None = Field(
        None,
        description="HOST:PORT of a running reward service (`accord serve-reward`), which "
        "scores with its own sources. none: the run starts one.",
    )
    tls: TlsSection | None = Field(
        None,
        description="Reach the service at `address` encrypted. An empty table is enough for a "
        "service whose certificate the system trusts. none: in clear.",
    )
    replicas: int = Field(
        1,
        ge=1,
        description="Number of reward services that the run starts. Workers ask the one with the "
        "fewest calls outstanding, and another when it fails.",
    )
    cpus: float = Field(1, gt=0, description="CPU cores that Ray reserves for a reward service.")
    gpus: float = Field(
        0,
        ge=0,
        description="GPUs that Ray reserves for a reward service. 0: a run's services score on "
        "CPUs.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="Where reward models score. auto: on a GPU where the service sees one "
        "(`accord serve-reward` sees all, a service of a run sees those of `reward.gpus`).",
    )
    dtype: DType = auto(
        "float32",
        rule="bfloat16 on a GPU that has it, and on a CPU where it is faster and the golden scores "
        "of all reward models came out alike in it when they were saved; else float32",
        description="Number type that the trunks of reward models compute in; their heads are "
        "float32. In bfloat16 the service starts only if a model's golden scores come out within a "
        "tenth of a standard deviation.",
    )
    resources: Resources = resources("a reward service")
    labels: Labels = labels("a reward service")

    @model_validator(mode="after")
    def _one_to_raise(self) -> RewardConfig:
        if all(source.at_least is not None for source in self.sources):
            raise ValueError("every source is a constraint (at_least): leave one without")
        return self

    def of_policy(self, name: str) -> list[Any]:
        """The sources that score the completions of this policy."""
        return [s for s in self.sources if not s.policies or name in s.policies]
