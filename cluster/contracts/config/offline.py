"""`accord sft`, `accord reward-model`, `accord dpo`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from cluster.contracts.config.base import (
    LoggingConfig,
    ModelConfig,
    Option,
    PluginFiles,
    RunConfig,
    Section,
    auto,
)
from cluster.contracts.config.compute import ComputeConfig
from cluster.contracts.config.lora import LoraConfig
from cluster.contracts.registry import PREFERENCE_LOSSES


class FitConfig(ComputeConfig):
    """The loop shared by SFT, reward model and DPO."""

    section: ClassVar[str] = "fit"
    unsupported: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("tensor_parallel", "sequence_parallel"),
        "offline training does not do it yet",
    )

    processes: int = auto(
        1,
        ge=1,
        description="Number of processes that train together, each on its own device or cores.",
        rule="one per core on a CPU, for a model below 50 million parameters and training that is "
        "estimated to take a core 30 s or longer, with 8 rows of a step or more for each, and at "
        "most 8; else 1. What torchrun has started, where it has.",
    )
    epochs: int = Field(1, ge=1, description="Passes over all rows.")
    max_steps: int | None = Field(None, ge=1, description="Stop after this many optimiser steps.")
    max_seconds: float | None = Field(
        None,
        gt=0,
        description="Stop after this many seconds. The learning rate then ends its schedule by "
        "that time.",
    )
    lr: float = Field(1e-4, gt=0, description="Highest learning rate.")
    warmup_ratio: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Share of the optimiser steps in which the learning rate rises to `lr`.",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine",
        description="Learning rate after the warm-up. constant: it stays. linear, cosine: it "
        "falls to 0.",
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
    betas: tuple[float, float] = Field(
        (0.9, 0.95), description="AdamW's decay rates of the first and the second moment."
    )
    eps: float = Field(1e-8, description="AdamW's epsilon, added to the root of the second moment.")
    max_grad_norm: float = Field(
        1.0, gt=0, description="A larger gradient is scaled down to this norm."
    )
    rows_per_step: int = Field(32, ge=1, description="Rows per optimiser step.")
    tokens_per_microbatch: int = Field(
        4096,
        ge=16,
        description="Most tokens in one forward pass, padding included. Lower it to save memory.",
    )
    max_tokens: int = Field(
        512, ge=2, description="Longest row, in tokens. Longer rows are left out and counted."
    )
    eval_fraction: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Share of the prompts held out for evaluation. A hash of the prompt decides.",
    )
    eval_every: int = Field(100, ge=1, description="Optimiser steps between evaluations.")
    checkpoint_every: int = Field(500, ge=1, description="Optimiser steps between checkpoints.")
    threads: int = Field(
        0,
        ge=0,
        description="Compute threads of each process. 0: the cores divided by `processes`.",
    )


class SftDataConfig(Section):
    path: str = Field(
        description="JSONL, JSON, CSV, TSV or Parquet file (also .gz), or `datasets:NAME`. A "
        "row holds messages, conversations, prompt and completion, text, or chosen "
        "and rejected (then chosen is used)."
    )
    split: str = Field("train", description="Split of `datasets:NAME`.")
    skip_bad_rows: bool = Field(
        False,
        description="Leave out and count the rows that cannot be read, instead of stopping at "
        "the first.",
    )


class SftConfig(Section):
    """`accord sft`: supervised fine-tuning on the assistant's tokens."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: SftDataConfig
    fit: FitConfig = FitConfig()
    lora: LoraConfig | None = Field(
        None,
        description="Train adapters (LoRA) instead of all weights. none: all weights.",
    )
    logging: LoggingConfig = LoggingConfig()


class PairsConfig(Section):
    path: str = Field(
        description="Rows with prompt, chosen and rejected (for loss=kto also rows with prompt, "
        "completion and label): a JSONL, JSON, CSV, TSV or Parquet file (also .gz), a snapshot, a "
        "folder that `datasets` saved, `datasets:NAME`, or a preference store (`*.db`), of which a "
        "snapshot is written into the run directory. Rows in the shapes of UltraFeedback, NeMo, "
        "Argilla and Label Studio are read as well."
    )
    split: str = Field("train", description="Split of a snapshot or of a data set.")
    skip_bad_rows: bool = Field(
        False,
        description="Leave out and count the rows that cannot be read, instead of stopping at "
        "the first.",
    )


class RewardModelConfig(Section):
    """`accord reward-model`: scalar heads learnt from pairs, ties and rankings."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: PairsConfig
    fit: FitConfig = FitConfig()
    lora: LoraConfig | None = Field(
        None,
        description="Train adapters (LoRA) and the head instead of all weights. none: all weights.",
    )
    use_margin: bool = Field(
        False,
        description="Margin loss: the chosen score must exceed the rejected one by the row's "
        "`margin`.",
    )
    ranking_loss: Literal["pairs", "plackett-luce"] = Field(
        "pairs",
        description="What is learnt from three completions or more in order. pairs: each two of "
        "them. plackett-luce: the order as a whole; rankings that hold ties count as pairs.",
    )
    use_weight: bool = Field(
        False, description="Multiply each row's loss by its `weight` (1 where a row has none)."
    )
    annotator_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="Multiply each row's loss by the weight of its `annotator`, such as "
        "{ann = 2.0, bob = 0.5}. Others count 1.",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="Assumed share of pairs that are labelled the wrong way round.",
    )
    tie_threshold: float = Field(
        0.0,
        ge=0,
        description="Rao-Kupper model of ties: completions whose scores differ by less than this "
        "are likely to be called equal. 0: ties in rankings are left out, rows with `tie = true` "
        "are refused.",
    )
    nll_coef: float = Field(
        0.0,
        ge=0,
        description="Weight of the best completion's negative log-likelihood per token, by the "
        "starting policy's frozen head on the trained trunk. It keeps the trunk general (GRM); "
        "about 0.01.",
    )
    centre_coef: float = Field(
        0.0,
        ge=0,
        description="Weight of (chosen score + rejected score)² in the loss. It keeps scores "
        "near 0.",
    )
    members: int = Field(
        1,
        ge=1,
        description="Reward models in an ensemble. Its scorer gives their mean, their minimum or "
        "a mean less their disagreement (`combine` of the reward source).",
    )
    share_trunk: bool = Field(
        True,
        description="Members are heads on one trunk, each trained on its own bootstrap of the "
        "rows. false: members are whole models, which need as many times the memory and time.",
    )
    slice_key: str = Field(
        "",
        description="Column by whose values held-out accuracy is reported as well. Empty: off.",
    )
    policy_samples: str | None = Field(
        None,
        description="File of completions of the policy that the reward is for (`accord generate`). "
        "Scores are centred on them (on 2048, evenly spaced, of more), and the report compares "
        "them with the training rows. none: scores are centred on the training rows.",
    )
    logging: LoggingConfig = LoggingConfig()


_REFUSED: dict[tuple[str, str], str] = {
    ("ipo", "label_smoothing"): "it would only rescale beta: use beta / (1 - 2 label_smoothing)",
    ("kto", "label_smoothing"): "kto judges one completion at a time, so there is no pair whose "
    "order could be wrong: use desirable_weight and undesirable_weight",
    ("kto", "length_normalised"): "the KL that kto compares with is in nats per completion",
    ("kto", "reference_free"): "the KL that kto compares with needs the reference",
    ("orpo", "label_smoothing"): "orpo's likelihood term trusts the chosen completion",
    ("orpo", "length_normalised"): "orpo is always so",
    ("orpo", "reference_free"): "orpo is always so",
    ("orpo", "nll_coef"): "orpo has this term with weight 1: change beta, the weight of the other",
    ("simpo", "length_normalised"): "simpo is always so",
    ("simpo", "reference_free"): "simpo is always so",
}
"""(loss, key) -> why the key cannot be set."""
_ONLY = {"target_margin": "simpo", "desirable_weight": "kto", "undesirable_weight": "kto"}


class DpoConfig(Section):
    """`accord dpo`: a policy trained directly on preferences (DPO and its relatives)."""

    plugins: PluginFiles = Field(
        [], description="Python files that add preference losses; see docs/extend.md."
    )
    run: RunConfig = RunConfig()
    model: ModelConfig
    data: PairsConfig
    fit: FitConfig = FitConfig()
    lora: LoraConfig | None = Field(
        None,
        description="Train adapters (LoRA) instead of all weights. The reference is then the model "
        "without them. none: all weights.",
    )
    loss: Annotated[str, AfterValidator(PREFERENCE_LOSSES.check)] = Field(
        "dpo",
        description="dpo: the odds that the chosen completion is better. ipo: a squared distance "
        "to a fixed margin. kto: also learns from single completions that are labelled good or "
        "bad. orpo: likelihood of the chosen completion plus odds, without a reference. simpo: "
        "mean log-probability with a margin, without a reference. A plugin may add others.",
    )
    loss_options: dict[str, Option] = Field(
        default_factory=dict, description="Options of a plugin's preference loss, by name."
    )
    beta: float = Field(
        0.1,
        gt=0,
        description="dpo, ipo, kto: how strongly the loss holds the policy to the reference. With "
        "a smaller value it moves further. simpo: scale of the reward (2 unless set). orpo: "
        "weight of the odds term.",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="dpo, simpo: assumed share of pairs that are labelled the wrong way round.",
    )
    length_normalised: bool = Field(
        False,
        description="dpo, ipo: divide log-ratios by the completion's tokens. orpo and simpo always "
        "do. `beta` then needs to be larger, about 5 for dpo.",
    )
    reference_free: bool = Field(
        False,
        description="dpo, ipo: use log-probabilities instead of log-ratios to the starting policy. "
        "orpo and simpo always do.",
    )
    nll_coef: float = Field(
        0.0,
        ge=0,
        description="dpo, ipo, kto, simpo: weight of the chosen completion's negative "
        "log-likelihood per token, which keeps it probable.",
    )
    target_margin: float = Field(
        1.0, ge=0, description="simpo: the chosen reward must exceed the rejected one by this."
    )
    desirable_weight: float = Field(
        1.0, gt=0, description="kto: weight of a completion that is labelled good."
    )
    undesirable_weight: float = Field(
        1.0, gt=0, description="kto: weight of a completion that is labelled bad."
    )
    kl_samples: int = Field(
        64,
        ge=0,
        description="When all steps are done, the policy writes one completion for so many "
        "held-out prompts, to measure its KL to the starting policy and its length. 0: off.",
    )
    logging: LoggingConfig = LoggingConfig()

    @property
    def uses_reference(self) -> bool:
        return PREFERENCE_LOSSES[self.loss].reference and not self.reference_free

    @property
    def uses_means(self) -> bool:
        """Whether the loss divides log-probabilities by the number of tokens."""
        return PREFERENCE_LOSSES[self.loss].per_token or self.length_normalised

    @model_validator(mode="before")
    @classmethod
    def _beta_of_simpo(cls, tree: Any) -> Any:
        """SimPO's beta is on means per token, so it has a default of its own."""
        if isinstance(tree, dict) and tree.get("loss") == "simpo":
            return {"beta": 2.0, **tree}
        return tree

    @model_validator(mode="after")
    def _check(self) -> DpoConfig:
        fields = type(self).model_fields
        for key in ("label_smoothing", "length_normalised", "reference_free", "nll_coef", *_ONLY):
            if getattr(self, key) == fields[key].default:
                continue
            if _ONLY.get(key, self.loss) != self.loss:
                raise ValueError(f"{key} belongs to loss = '{_ONLY[key]}': leave it out")
            if (self.loss, key) in _REFUSED:
                why = _REFUSED[self.loss, key]
                raise ValueError(f"{key} cannot be set with loss = '{self.loss}': {why}")
        self._check_options()
        return self

    def _check_options(self) -> None:
        loss, shared = PREFERENCE_LOSSES[self.loss], ("beta", "label_smoothing")
        own = [] if loss.function is None else [n for n in loss.options if n not in shared]
        for name in self.loss_options:
            if name not in own:
                valid = ", ".join(own) or "none"
                raise ValueError(f"unknown option loss_options.{name}; valid here: {valid}")
        smoothed = loss.function is not None and self.label_smoothing > 0
        if smoothed and "label_smoothing" not in loss.options:
            raise ValueError(f"loss = '{self.loss}' takes no label_smoothing: leave it out")
