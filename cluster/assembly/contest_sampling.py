"""The completions of several policies for the same prompts, turn after turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from cluster.assembly.adapted import adapted
from cluster.assembly.contest import Written, next_turn, turn_prompt
from cluster.assembly.prepare import prompt_room
from cluster.assembly.sampling import Sampling, prompts_for, sample_jobs
from cluster.contracts.chat import render_prompt
from cluster.contracts.config.base import ModelConfig
from cluster.contracts.config.evaluate import EvaluateConfig
from cluster.contracts.errors import UserError
from cluster.contracts.records import Prompt, Rollout
from cluster.machine.shipment import Shipment

AT_ONCE = 2  # policies that are sampled side by side, each with workers of its own

Say = Callable[[str], None]


def prompts_of(config: EvaluateConfig, say: Say | None = None) -> list[list[Prompt]]:
    """The prompts that every policy takes, tokenised for each of them. ``say`` is told what is left
    out."""
    most, seed, answer = config.max_prompts, config.run.seed, config.rollout.max_tokens
    found = [
        prompts_for(model, config.data, seed, most, answer, say if n == 0 else None)
        for n, model in enumerate(config.contestants.values())
    ]
    shared = set.intersection(*({prompt.id for prompt in own} for own in found))
    if not shared:
        raise UserError(
            f"no prompt is short enough for {'both' if len(found) == 2 else 'all'} models",
            where=config.data.prompts,
            fix="give shorter prompts, or raise data.max_prompt_tokens",
        )
    alone = len({prompt.id for own in found for prompt in own} - shared)
    if alone and say is not None:
        said = "one of the two models takes" if len(found) == 2 else "some of the models take"
        say(f"left out {alone} prompts that only {said}")
    return [[prompt for prompt in own if prompt.id in shared] for own in found]


def sample_all(
    config: EvaluateConfig,
    prompts: Sequence[Sequence[Prompt]],
    files: Sequence[Shipment] = (),
    say: Say | None = None,
) -> Written:
    """All turns of all policies; within `sampling_cluster`."""
    models = [adapted(model) for model in config.contestants.values()]
    sent = files or [Shipment()] * len(models)
    turns = [_sample(config, models, prompts, sent, config.samples)]
    for turn in range(1, config.turns):
        following = _following(config, models, turns[-1], turn, say)
        if not following[0]:
            break
        turns.append(_sample(config, models, following, sent, 1))
    return Written(tuple(config.contestants), tuple(tuple(map(tuple, turn)) for turn in turns))


def _sample(
    config: EvaluateConfig,
    models: Sequence[ModelConfig],
    prompts: Sequence[Sequence[Prompt]],
    files: Sequence[Shipment],
    samples: int,
) -> list[list[Rollout]]:
    longest = max(len(prompt.token_ids) for own in prompts for prompt in own)
    jobs = [
        Sampling(
            model=model,
            prompts=own,
            samples=samples,
            rollout=config.rollout,
            max_prompt_tokens=longest,
            # The same seed for all: a policy compared with itself then ties everywhere.
            seed=config.run.seed,
            files=sent,
        )
        for model, own, sent in zip(models, prompts, files, strict=True)
    ]
    found: list[list[Rollout]] = []
    for first in range(0, len(jobs), AT_ONCE):
        found += sample_jobs(jobs[first : first + AT_ONCE])
    return found


def _following(
    config: EvaluateConfig,
    models: Sequence[ModelConfig],
    before: Sequence[Sequence[Rollout]],
    turn: int,
    say: Say | None,
) -> list[list[Prompt]]:
    """The prompts of the next turn, of each policy with its own completions in them. A question
    that has become too long for one of the policies ends for all."""
    tokenizers = [_tokenizer(model) for model in models]
    found: list[list[Prompt]] = [[] for _ in models]
    too_long = 0
    for rollouts in zip(*before, strict=True):
        messages = [next_turn(rollout, turn) for rollout in rollouts]
        made = [
            turn_prompt(rollout, turn, said, render_prompt(tokenizer, said))
            for rollout, said, tokenizer in zip(rollouts, messages, tokenizers, strict=True)
            if said is not None
        ]
        if not made:
            continue
        if all(
            len(prompt.token_ids) <= _room(config, model)
            for prompt, model in zip(made, models, strict=True)
        ):
            for own, prompt, rollout in zip(found, made, rollouts, strict=True):
                own.append(replace(prompt, where=rollout.prompt.where))
        else:
            too_long += 1
    if too_long and say is not None:
        say(f"left out turn {turn + 1} of {too_long} questions: too long with what was said before")
    return found


def _room(config: EvaluateConfig, model: ModelConfig) -> int:
    """Tokens of a later turn's prompt: the completions before it count, so that the limit of the
    file's prompts is none for it."""
    answer = config.rollout.max_tokens
    room = prompt_room(model, answer)
    limit = (config.data.max_prompt_tokens + answer) * config.turns
    return limit if room is None else min(room, limit)


def _tokenizer(model: ModelConfig) -> Any:
    from learner.models.load import load_tokenizer

    return load_tokenizer(model)
