"""What is checked before anything starts: model, tokenizer, prompts, rewards."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster.assembly.rewards import check_rewards
from cluster.contracts.config.base import ModelConfig
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import UserError
from cluster.contracts.records import Prompt


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is checked before anything starts, so that a mistake leaves nothing behind."""

    config: TrainConfig
    prompts: Any
    tokenizer: Any
    stop_ids: tuple[int, ...]
    tokenizer_fingerprint: str
    held_out: tuple[Prompt, ...] = ()  # to evaluate the policy with while it trains
    leaked: int = 0  # prompts left out of these, because the policy trains on them


def prepare(config: TrainConfig) -> Prepared:
    """Read tokenizer and prompts, check what can be checked without starting anything."""
    from actors.policy_prompts import load_prompts_of_policies
    from actors.prompts import load_prompts
    from learner.models.load import load_tokenizer, stop_token_ids
    from learner.models.reward_artifact import require_same_tokenizer, tokenizer_fingerprint

    require_torchao(config)
    check_models(config)
    tokenizer = load_tokenizer(config.model)
    if config.learner.value_path is not None:
        require_same_tokenizer(config.learner.value_path, tokenizer)
    room = prompt_room(config.model, config.rollout.max_tokens)
    prompts: Any
    if config.policies:
        prompts = load_prompts_of_policies(
            config.policies, config.data, tokenizer, config.run.seed, room
        )
    else:
        prompts = load_prompts(config.data, tokenizer, config.run.seed, room)
    check_rewards(config.reward, prompts.all())
    held_out, leaked = _held_out(config, prompts, tokenizer, room)
    return Prepared(
        config=config,
        prompts=prompts,
        tokenizer=tokenizer,
        stop_ids=stop_token_ids(config.model.path, tokenizer, config.model.revision),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        held_out=held_out,
        leaked=leaked,
    )


def _held_out(
    config: TrainConfig, training: Any, tokenizer: Any, room: int | None
) -> tuple[tuple[Prompt, ...], int]:
    """The prompts of `[evaluation]`, and how many of them were left out as training prompts. Raises
    UserError for ones that cannot be read, or a judge that cannot be used."""
    from actors.policy_prompts import held_out_of_policies
    from actors.prompts import load_prompts

    evaluation = config.evaluation
    if not evaluation.prompts:
        return (), 0
    where = {"prompts": evaluation.prompts, "split": evaluation.split, "shuffle": False}
    found = load_prompts(config.data.model_copy(update=where), tokenizer, config.run.seed, room)
    trained = {_words_of(prompt) for prompt in training.all()}
    apart = [prompt for prompt in found.all() if _words_of(prompt) not in trained]
    if not apart:
        raise UserError(
            f"all {len(found)} prompts are training prompts, too",
            where=f"evaluation.prompts = {evaluation.prompts}",
            fix="give prompts that are not in data.prompts",
        )
    held_out = tuple(apart[: evaluation.max_prompts])
    if config.policies:
        held_out = held_out_of_policies(held_out, [policy.name for policy in config.policies])
    if evaluation.judge is not None:
        check_rewards(evaluation.judge, held_out)
    return held_out, len(found) - len(apart)


def _words_of(prompt: Prompt) -> tuple[tuple[str, ...], ...]:
    """What makes two prompts the same: roles and words, whatever their case and spaces."""
    return tuple((m["role"], *m["content"].casefold().split()) for m in prompt.messages)


def with_pinned_models(config: TrainConfig) -> TrainConfig:
    """Hub ids get the commit that every host uses, also when the run is resumed. Raises UserError
    for a model that is neither a directory nor on the hub."""
    from learner.models.hub import pinned

    learner = config.learner
    model = pinned(config.model)
    if learner.reference_path is not None:
        given = ModelConfig(path=learner.reference_path, revision=learner.reference_revision)
        revision = pinned(given).revision
        learner = learner.model_copy(update={"reference_revision": revision})
    return config.model_copy(update={"model": model, "learner": learner})


def require_torchao(config: TrainConfig) -> None:
    """Raises UserError where a key needs torchao and it is not here: told before anything starts.
    On a cluster that is joined, the learner's own host says it."""
    keys = {
        "learner.optimizer": config.learner.optimizer == "adamw8bit",
        "lora.base": config.lora is not None and config.lora.base != "full",
    }
    wanted = [key for key, needs in keys.items() if needs]
    if wanted and config.cluster.to_join is None and find_spec("torchao") is None:
        raise UserError(
            "needs torchao, which is not installed",
            where=wanted[0],
            fix="uv pip install --no-deps -r requirements/quantised.txt, or leave the key out",
        )


def check_models(config: TrainConfig) -> None:
    """Raise UserError for a policy, reference or value model that cannot be loaded, as far as the
    headers of the weight files tell."""
    from learner.models.files import check_causal_model, check_reward_model
    from learner.models.reward_artifact import read_artifact

    model, learner = config.model, config.learner
    check_causal_model(model.path, model.revision, model.trust_remote_code)
    if learner.reference_path is not None:
        revision = learner.reference_revision
        check_causal_model(learner.reference_path, revision, model.trust_remote_code)
    if learner.value_path is not None:
        read_artifact(Path(learner.value_path))
        check_reward_model(learner.value_path)


def prompt_room(model: ModelConfig, max_tokens: int) -> int | None:
    """Tokens the model's context leaves for a prompt beside ``max_tokens`` of answer, None when it
    is not known. Raises UserError when that is nothing."""
    context = context_length(model)
    if context is None:
        return None
    room = context - max_tokens
    if room < 1:
        raise UserError(
            f"rollout.max_tokens = {max_tokens} leaves no room for a prompt in the model's context "
            f"of {context} tokens",
            where=model.path,
            fix="lower rollout.max_tokens",
        )
    return room


def context_length(model: ModelConfig) -> int | None:
    """Most tokens the model can attend to, or None when its config does not say."""
    import transformers

    from learner.models.files import explained, require_directory

    require_directory(model.path, "config.json")
    config = explained(
        lambda: transformers.AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        ),
        model.path,
        "model",
    )
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None
