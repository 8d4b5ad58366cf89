"""Loading and saving: policies, tokenizers, reward models, value networks.

Master weights are always float32; `compute.optimizer.compute_in` chooses what is computed in.
Models stay in eval mode (no dropout): two passes of the same weights agree, ratios are exact.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from cluster.contracts.config.base import ModelConfig
from cluster.contracts.errors import UserError
from learner.compute.ulysses import SequencePart
from learner.models.files import (
    Placing,
    as_list,
    explained,
    load_checked,
    load_placed,
    quiet_transformers,
    read_template,
    replace_directory,
    require_directory,
)
from learner.models.fill import read_tensor
from learner.models.heads import (
    check_lm_head,
    reward_scores,
    trunk_states,
    zero_linear,
)
from learner.models.packed_attention import Spans
from learner.models.reward_artifact import RewardArtifact, read_artifact

GOLDEN_TOLERANCE = 1e-2
"""Relative to max(1, |score|): float32 on another machine differs far less, a wrong head more."""


def load_policy(cfg: ModelConfig, placing: Placing | None = None) -> Any:
    """A causal language model in float32 and eval mode, on the CPU; every parameter trainable.

    placing: where else, in which type, and in which parts (see `Placing`); then the caller checks
    the head (`check_lm_head`) through the module that forward passes have to go through.
    Raises UserError for a missing directory, one that holds no model, an unknown architecture, an
    unreachable hub id, damaged or incomplete weights, logits Accord cannot reproduce.
    """
    kind, source = transformers.AutoModelForCausalLM, (cfg.path, cfg.revision)
    if placing is not None:
        return load_placed(kind, *source, cfg.trust_remote_code, placing)
    model = load_checked(kind, *source, cfg.trust_remote_code)
    check_lm_head(model)
    return model


def load_trunk(cfg: ModelConfig, placing: Placing, reward_model: str | None = None) -> Any:
    """The decoder trunk of a causal language model, or of a reward model, without its head;
    otherwise as `load_policy`."""
    if reward_model is None:
        kind: Any = transformers.AutoModelForCausalLM
        source = (cfg.path, cfg.revision, cfg.trust_remote_code)
    else:
        kind, source = transformers.AutoModelForSequenceClassification, (reward_model, None, False)
    return load_placed(kind, *source, placing, part=lambda model: model.base_model)


def load_sequence_classifier(
    cfg: ModelConfig, *, pad_token_id: int, heads: int = 1, placing: Placing | None = None
) -> Any:
    """The policy's trunk under scalar `score` heads of zeros, to be trained as a reward model."""
    kind, source = transformers.AutoModelForSequenceClassification, (cfg.path, cfg.revision)
    given: Any = {"may_miss": ("score.",), "num_labels": heads, "pad_token_id": pad_token_id}
    if placing is None:
        model = load_checked(kind, *source, cfg.trust_remote_code, **given)
    else:
        model = load_placed(kind, *source, cfg.trust_remote_code, placing, **given)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(
            f"{type(model).__name__} has no linear `score` head",
            where=cfg.path,
            fix="use a decoder such as Llama, Qwen, Gemma or Mistral",
        )
    nn.init.zeros_(model.score.weight)
    model.config.get_text_config().pad_token_id = pad_token_id
    return model


def load_tokenizer(source: ModelConfig | str | Path) -> Any:
    """The fast tokenizer of a model, with the chat template of ModelConfig.chat_template if given.

    Raises UserError where there is none, or where it has no end token.
    """
    cfg = source if isinstance(source, ModelConfig) else ModelConfig(path=str(source))
    require_directory(cfg.path, "config.json", "tokenizer_config.json")
    tokenizer = explained(
        lambda: transformers.AutoTokenizer.from_pretrained(
            cfg.path, revision=cfg.revision, trust_remote_code=cfg.trust_remote_code
        ),
        cfg.path,
        "tokenizer",
    )
    # Without its vocabulary file, transformers makes a tokenizer of special tokens alone.
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise UserError(
            "the directory holds no tokenizer (tokenizer.json is missing)",
            where=cfg.path,
            fix="copy the tokenizer's files of the model it was made from into it",
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end token, so no answer could ever end",
            where=cfg.path,
            fix="set eos_token in its tokenizer_config.json",
        )
    if cfg.chat_template is not None:
        tokenizer.chat_template = read_template(cfg.chat_template)
    # Rows over the limits are named by whoever reads them; transformers would warn as well.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def stop_token_ids(
    path: str | Path, tokenizer: Any, revision: str | None = None
) -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's end token first, then those of generation_config.json
    (Llama 3, for one, ends turns with a second token)."""
    found = [int(tokenizer.eos_token_id)]
    if (Path(path) / "generation_config.json").exists() or not Path(path).exists():
        config = explained(
            lambda: transformers.GenerationConfig.from_pretrained(str(path), revision=revision),
            str(path),
            "generation config",
            missing=transformers.GenerationConfig(),
        )
        found += as_list(config.eos_token_id)
    return tuple(dict.fromkeys(found))


def save_policy(
    policy: Any,
    tokenizer: Any,
    directory: str | Path,
    tensors: dict[str, Tensor] | None = None,
) -> Path:
    """Write a complete model directory: safetensors, config, generation config with the end tokens,
    tokenizer with template. Written beside and renamed, so a reader never sees half of it.

    tensors: the state dict to write, for a policy whose own is sharded.
    """
    ends = [tokenizer.eos_token_id, *as_list(policy.generation_config.eos_token_id)]
    unique = list(dict.fromkeys(int(end) for end in ends))
    policy.generation_config.eos_token_id = unique if len(unique) > 1 else unique[0]
    if policy.generation_config.pad_token_id is None:
        policy.generation_config.pad_token_id = tokenizer.pad_token_id

    def write(folder: Path) -> None:
        with quiet_transformers():
            policy.save_pretrained(folder, state_dict=tensors)
        tokenizer.save_pretrained(folder)

    return replace_directory(Path(directory), write)


def load_reward_model(path: str | Path, *, check: bool = True) -> tuple[Any, RewardArtifact]:
    """A reward model made by `accord reward-model`, and its artifact record.

    check: recompute its golden scores. Raises UserError where the directory is no such model or
    does not give the scores it was saved with (other weights, other tokenizer, other code).
    """
    require_directory(str(path))
    artifact = read_artifact(Path(path))
    model = load_checked(transformers.AutoModelForSequenceClassification, str(path), None, False)
    if check:
        _check_golden(model, artifact, str(path))
    return model, artifact


def load_reward_members(path: str | Path) -> list[tuple[Any, RewardArtifact]]:
    """Every model of a reward model's directory: one, or those of an ensemble of whole models.

    Raises UserError as `load_reward_model`.
    """
    first, artifact = load_reward_model(path)
    others = [load_reward_model(Path(path) / name) for name in artifact.others]
    return [(first, artifact), *others]


@torch.no_grad()
def _check_golden(model: Any, artifact: RewardArtifact, where: str) -> None:
    for row in artifact.golden:
        ids = torch.tensor([row.token_ids])
        score = float(reward_scores(model, ids, torch.ones_like(ids))[0])
        if not abs(score - row.score) <= GOLDEN_TOLERANCE * max(1.0, abs(row.score)):
            raise UserError(
                f"scores {score:.5f} where it scored {row.score:.5f} when it was saved",
                where=where,
                fix="its files were changed or mixed up: make it again with `accord reward-model`",
            )


class ValueModel(nn.Module):
    """A value network of its own: trunk and linear head; [B, T] ids and mask -> [B, T] float32.

    Column t is the value of the state after token t.
    """

    def __init__(self, trunk: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    @classmethod
    def from_reward_model(cls, path: str | Path, *, normalised: bool = True) -> ValueModel:
        """Starts as the reward model's score at every token; `normalised` as in its artifact,
        which is the scale PPO gets rewards in."""
        model, artifact = load_reward_model(path)
        return cls(model.base_model, _value_head(model.score.weight, artifact, normalised))

    @classmethod
    def from_policy(cls, policy: Any, *, shared: bool = False) -> ValueModel:
        """A copy of the policy's trunk under a head that gives 0. shared: its parameters are the
        policy's own, to be frozen under adapters."""
        held = {id(p): p for p in policy.parameters()} if shared else {}
        trunk = copy.deepcopy(policy.base_model, dict(held))
        return cls(trunk, zero_linear(policy.config.get_text_config().hidden_size))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        spans: Spans | None = None,
        part: SequencePart | None = None,
    ) -> Tensor:
        hidden = trunk_states(self.trunk, input_ids, attention_mask, spans, part)
        with torch.autocast(hidden.device.type, enabled=False):
            value: Tensor = self.head(hidden.float())
        return value.squeeze(-1)


def load_value_head(reward_model: str | None, hidden_size: int) -> nn.Linear:
    """The head of `ValueModel.from_reward_model`, or one that gives 0."""
    if reward_model is None:
        return zero_linear(hidden_size)
    return _value_head(read_tensor(reward_model, "score.weight"), read_artifact(Path(reward_model)))


def _value_head(score: Tensor, artifact: RewardArtifact, normalised: bool = True) -> nn.Linear:
    """score: [K, H], the heads of a reward model."""
    head = zero_linear(score.shape[1])
    scale, shift = 1.0, 0.0
    if normalised:
        scale, shift = artifact.centre_std, artifact.centre_mean
    with torch.no_grad():
        # Of an ensemble: its mean, which is what the scores are centred on.
        head.weight.copy_(score.float().mean(dim=0, keepdim=True) / scale)
        head.bias.fill_(-shift / scale)
    return head
