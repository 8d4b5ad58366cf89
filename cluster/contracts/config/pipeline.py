"""`accord pipeline`: rounds of sampling, labelling, training and evaluation, in one file.

The sections of a stage are those of its own command. What the pipeline sets itself (the model of a
round, its labels, its reward model, the run directory) is refused there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from cluster.contracts.config.base import ClusterConfig, ModelConfig, RunConfig, Section
from cluster.contracts.config.best_of_n import BestOfNConfig
from cluster.contracts.config.choice import ChoiceConfig
from cluster.contracts.config.evaluate import EvaluateConfig
from cluster.contracts.config.file import check_config, problems_of, put
from cluster.contracts.config.judge import HELPFUL, JudgeConfig
from cluster.contracts.config.label import LabelDataConfig, LabelPageConfig, LabelServerConfig
from cluster.contracts.config.offline import DpoConfig, RewardModelConfig, SftConfig
from cluster.contracts.config.preferences import QualityConfig, SnapshotConfig
from cluster.contracts.config.rollout import DataConfig, RolloutConfig
from cluster.contracts.config.train import TrainConfig

S = TypeVar("S", bound=Section)
EVEN = 0.5  # the win rate of equal policies
LATER = "set-by-the-pipeline"  # stands for a path while the sections are checked


def _without_none(tree: Any) -> Any:
    """TOML has no value for "none": such a key is one that was not given."""
    if isinstance(tree, Mapping):
        return {key: _without_none(value) for key, value in tree.items() if value is not None}
    return tree


def _fit_at_least(tree: Any) -> Any:
    """A section without a key would not be in the stored config, and its stage would be gone."""
    return {"fit": {}, **tree} if tree == {} else tree


Tree = Annotated[dict[str, Any], BeforeValidator(_without_none)]
"""A section as another command has it; checked as a whole, with what the pipeline sets."""


@dataclass(frozen=True, slots=True)
class StageSection:
    """``kind``: the config of the stage's command. ``filled``: key -> where its value comes
    from."""

    kind: type[Section]
    filled: Mapping[str, str]


_RUN = {"run": "a folder of the pipeline's run"}
_MODEL = {"model": "the newest promoted policy"}
_LABELS = {"data": "the labels of all rounds"}
_CLUSTER = {"cluster": "[cluster] of the pipeline"}
STAGES: dict[str, StageSection] = {
    "sft": StageSection(SftConfig, _RUN | {"model": "[model] of the pipeline"}),
    "reward_model": StageSection(
        RewardModelConfig,
        _RUN | _MODEL | _LABELS | {"policy_samples": "the completions of the round"},
    ),
    "train": StageSection(
        TrainConfig,
        _RUN
        | _MODEL
        | _CLUSTER
        | {
            "learner.value_path": "the reward model of the round",
            "learner.reference_path": "the newest promoted policy",
        },
    ),
    "dpo": StageSection(DpoConfig, _RUN | _MODEL | _LABELS),
    "best_of_n": StageSection(BestOfNConfig, _RUN | _MODEL | _CLUSTER),
    "best_of_n_sft": StageSection(
        SftConfig, _RUN | _MODEL | {"data": "the best completions of the round"}
    ),
    "evaluate": StageSection(
        EvaluateConfig,
        _RUN
        | _CLUSTER
        | {
            "policy": "the policy of the round",
            "baseline": "the policy before the round",
            "policies": "the policy of the round and the one before it",
        },
    ),
}
POLICY_STAGES = ("train", "dpo", "best_of_n")


def _tree(command: str, more: str = "") -> Any:
    return Field(
        None,
        description=f"The sections of `accord {command}`, as in its own file, without what the "
        f"pipeline sets. {more}".strip(),
    )


class SampleConfig(Section):
    """Completions that are compared: sampled by the newest promoted policy."""

    data: DataConfig
    samples: int = Field(4, ge=2, description="Completions per prompt.")
    prompts_per_round: int | None = Field(
        None,
        ge=1,
        description="Prompts of a round. Each round takes the next ones of the file; after the "
        "last one it begins again. none: all.",
    )
    rollout: RolloutConfig = RolloutConfig()


class PipelineLabelConfig(Section):
    """Who judges the pairs."""

    by: Literal["people", "simulated", "ai"] = Field(
        "people",
        description="people: the pipeline serves the pages of `accord label` and waits. "
        "simulated: a Python function. ai: an AI judge, as `accord ai-label`.",
    )
    annotate: str | None = Field(
        None,
        description="With simulated: `FILE.py:FUNCTION`, called for each judgement; "
        "docs/pipeline.md has an example.",
    )
    judge: JudgeConfig | None = Field(None, description="With ai: the judge.")
    criteria: str = Field(
        HELPFUL, min_length=1, description="With ai: what the judge is told to prefer."
    )
    data: LabelDataConfig = LabelDataConfig()
    page: LabelPageConfig = LabelPageConfig()
    server: LabelServerConfig = LabelServerConfig()

    @model_validator(mode="after")
    def _check(self) -> PipelineLabelConfig:
        for by, key in (("simulated", "annotate"), ("ai", "judge")):
            if (self.by == by) != (getattr(self, key) is not None):
                raise ValueError(
                    f"by = '{by}' needs {key}"
                    if self.by == by
                    else f"{key} belongs to by = '{by}': leave it out, or set by = '{by}'"
                )
        for key in ("files", "completions"):
            if getattr(self.data, key) != LabelDataConfig.model_fields[key].default:
                raise ValueError(f"data.{key} is set by the pipeline ([sample], [choice])")
        return self


class PromoteConfig(Section):
    """Whether a round's policy becomes the one that the next round starts from."""

    min_win_rate: float = Field(
        EVEN,
        ge=0,
        le=1,
        description="The lower end of the 95 % interval of the win rate against the policy before "
        "the round must exceed this. 0: every round is promoted.",
    )


class PipelineConfig(Section):
    """`accord pipeline`: sample, label, train, evaluate and promote, round after round."""

    run: RunConfig = RunConfig()
    rounds: int = Field(1, ge=1, description="How often to go round.")
    model: ModelConfig
    sft: Tree | None = _tree("sft", "Done once, before the first round. none: no SFT.")
    sample: SampleConfig
    choice: ChoiceConfig = ChoiceConfig()
    label: PipelineLabelConfig = PipelineLabelConfig()
    snapshot: SnapshotConfig = SnapshotConfig(test_fraction=0.0)
    quality: QualityConfig = QualityConfig()
    reward_model: Annotated[Tree, BeforeValidator(_fit_at_least)] | None = _tree(
        "reward-model", "Needed for `train` and `best_of_n`."
    )
    train: Tree | None = _tree(
        "train",
        "Its reward is the round's reward model, beside the sources that are given here. A source "
        "of type `model` without a path stands for it, such as one with a `weight` of its own.",
    )
    dpo: Annotated[Tree, BeforeValidator(_fit_at_least)] | None = _tree(
        "dpo", "In place of `train`: DPO, IPO, KTO, ORPO or SimPO on the labels."
    )
    best_of_n: Tree | None = _tree(
        "best-of-n", "In place of `train`: SFT on the completions that the reward model prefers."
    )
    best_of_n_sft: Annotated[Tree, BeforeValidator(_fit_at_least)] | None = _tree(
        "sft", "The SFT on the best completions."
    )
    evaluate: Tree | None = _tree(
        "evaluate",
        "The round's policy against the one before the round, and against that of the start. none: "
        "no evaluation, and every round is promoted.",
    )
    promote: PromoteConfig = PromoteConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def policy_stage(self) -> str:
        """Which of ``POLICY_STAGES`` makes the policy."""
        return next(name for name in POLICY_STAGES if getattr(self, name) is not None)

    @model_validator(mode="after")
    def _check(self) -> PipelineConfig:
        problems = [*self._combination_problems(), *self._section_problems()]
        if problems:
            raise ValueError("\n  ".join(problems))
        return self

    def _combination_problems(self) -> Iterator[str]:
        given = [name for name in POLICY_STAGES if getattr(self, name) is not None]
        if len(given) != 1:
            found = f"there are {' and '.join(given)}" if given else "there is none"
            yield f"give one of train, dpo and best_of_n, which makes a round's policy: {found}"
            return
        if (given[0] == "dpo") != (self.reward_model is None):
            yield (
                "dpo learns from the labels themselves: leave reward_model out"
                if self.reward_model is not None
                else f"{given[0]} needs a reward: give [reward_model]"
            )
        if (given[0] == "best_of_n") != (self.best_of_n_sft is not None):
            yield "best_of_n and best_of_n_sft belong together: give both or none of them"
        if self.evaluate is not None and "people" in self.evaluate:
            yield (
                "evaluate.people would wait with models in memory: give a judge here, and let "
                "people compare the policies with `accord evaluate` afterwards"
            )
        if self.evaluate is None and self.promote.min_win_rate not in (0.0, EVEN):
            yield "promote.min_win_rate needs a win rate: give [evaluate]"

    def _section_problems(self) -> Iterator[str]:
        for name, section in STAGES.items():
            tree = getattr(self, name)
            if tree is None:
                continue
            for key, origin in section.filled.items():
                if _has(tree, key):
                    yield f"{name}.{key} is set by the pipeline ({origin}): leave it out"
            values = {key: _stand_in(section.kind, key) for key in section.filled}
            tree = _completed(name, tree, values, LATER if self.reward_model is not None else None)
            yield from problems_of(section.kind, tree, prefix=f"{name}.")

    def of_stage(
        self, kind: type[S], name: str, values: Mapping[str, Any], reward_model: str | None = None
    ) -> S:
        """The config of a stage's command: its section, with ``values`` for the keys that the
        pipeline sets (None: not set). ``reward_model``: of the round."""
        tree = _completed(name, getattr(self, name) or {}, values, reward_model)
        return check_config(kind, tree, where=f"[{name}] of the pipeline")


def _stand_in(kind: type[Section], key: str) -> Any:
    """Anything that passes: the real value is known when the stage begins."""
    if key in ("model", "policy", "baseline"):
        return {"path": LATER}
    if key == "data":
        return {"path": LATER}
    return None


def _completed(
    name: str, given: Mapping[str, Any], values: Mapping[str, Any], reward_model: str | None
) -> dict[str, Any]:
    tree: dict[str, Any] = copy.deepcopy(dict(given))
    for key, value in values.items():
        if value is not None:
            put(tree, key, value)
    if name in ("train", "best_of_n") and reward_model is not None:
        _put_reward_model(tree, reward_model)
    return tree


def _put_reward_model(tree: dict[str, Any], path: str) -> None:
    """Into the sources of type "model" that name none, or else before all sources."""
    reward = tree.setdefault("reward", {})
    if not isinstance(reward, dict):
        return  # what is wrong with it is told by the check of the whole
    sources = reward.setdefault("sources", [])
    if not isinstance(sources, list):
        return
    own = [
        one
        for one in sources
        if isinstance(one, dict) and one.get("type") == "model" and "path" not in one
    ]
    if not own:
        own = [{"type": "model"}]
        sources.insert(0, own[0])
    for source in own:
        source["path"] = path


def _has(tree: Mapping[str, Any], key: str) -> bool:
    node: Any = tree
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return True
