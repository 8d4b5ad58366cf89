"""A local model as the judge: it samples one of the allowed letters, on Accord's own workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from cluster.assembly.local_workers import sampling_cluster
from cluster.assembly.prepare import prompt_room
from cluster.assembly.sampling import Sampling, sample_jobs
from cluster.assembly.shipping import sampled_models
from cluster.contracts.chat import render_prompt, require_template
from cluster.contracts.config.base import ClusterConfig, ModelConfig
from cluster.contracts.config.judge import JudgeConfig
from cluster.contracts.config.rollout import LEAST_TEMPERATURE, RolloutConfig
from cluster.contracts.errors import UserError
from cluster.contracts.records import Prompt
from cluster.machine.cores import own_cores
from reward_service.judge.records import Question, Spent


class LocalAsker:
    """``Asker`` of a model directory. All questions of a call are sampled in one go, so the answers
    come together; nothing is paid, and nothing is cached."""

    def __init__(self, config: JudgeConfig, cluster: ClusterConfig) -> None:
        from learner.models.hub import pinned
        from learner.models.load import load_tokenizer

        self.model = config.model
        self._temperature = max(LEAST_TEMPERATURE, config.temperature)
        self._cluster = cluster
        self._config = pinned(ModelConfig(path=config.model))
        self._tokenizer = load_tokenizer(self._config)
        require_template(self._tokenizer, config.model)
        self._spent = Spent()

    @property
    def spent(self) -> Spent:
        return self._spent

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Any]]:
        if not questions:
            return
        prompts = [self._prompt(number, question) for number, question in enumerate(questions)]
        job = Sampling(
            model=self._config,
            prompts=prompts,
            samples=1,
            rollout=RolloutConfig(
                max_tokens=1,
                temperature=self._temperature,
                allowed_tokens=self._letters(questions),
                workers=max(1, len(own_cores())),
            ),
            max_prompt_tokens=max(len(prompt.token_ids) for prompt in prompts),
        )
        with (
            sampling_cluster(self._cluster, job.rollout) as ray_info,
            sampled_models([self._config], ray_info) as files,
        ):
            rollouts = sample_jobs([replace(job, files=files[0])])[0]
        self._spent = replace(
            self._spent,
            requests=self._spent.requests + len(prompts),
            prompt_tokens=self._spent.prompt_tokens + sum(len(p.token_ids) for p in prompts),
            completion_tokens=self._spent.completion_tokens + len(prompts),
        )
        for number, (question, rollout) in enumerate(zip(questions, rollouts, strict=True)):
            yield number, question.read(rollout.text)

    def _prompt(self, number: int, question: Question) -> Prompt:
        tokens = tuple(render_prompt(self._tokenizer, question.messages))
        room = prompt_room(self._config, 1)
        if room is not None and len(tokens) > room:
            raise UserError(
                f"the question about {question.label} has {len(tokens)} tokens, and the judge's "
                f"context takes {room}",
                where=self.model,
                fix="give a judge with a longer context, or shorter completions",
            )
        return Prompt(id=str(number), messages=question.messages, token_ids=tokens)

    def _letters(self, questions: Sequence[Question]) -> tuple[int, ...]:
        """The token of each letter that may be answered."""
        letters = sorted({letter for question in questions for letter in question.letters})
        ids = [self._tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in letters]
        if not letters or any(len(tokens) != 1 for tokens in ids):
            raise UserError(
                f"the tokenizer does not write each of {', '.join(letters) or 'its answers'} as "
                "one token, so the model cannot answer by one letter",
                where=self.model,
                fix="give another judge, or one behind an endpoint",
            )
        return tuple(tokens[0] for tokens in ids)

    def close(self) -> None:
        """Nothing is held between calls."""
