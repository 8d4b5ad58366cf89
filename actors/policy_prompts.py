"""Prompts of several policies, which take turns."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

from actors.prompts import FilePromptSource, load_prompts
from cluster.contracts.config.policies import PolicyConfig, turns
from cluster.contracts.config.rollout import DataConfig
from cluster.contracts.errors import UserError
from cluster.contracts.records import Prompt
from cluster.contracts.rows.reader import LeftOut

POLICY = "policy"
"""Column of a prompt's row that says which policy it is for, to its reward."""


class PromptsOfPolicies:
    """``PromptSource`` over the prompts of several policies, which take turns: any ``len(turns)``
    prompts in a row hold each policy's share. Each policy has its own order and epochs.

    turns: places in `sources`, over and over.
    """

    def __init__(self, sources: Sequence[FilePromptSource], turns: Sequence[int]) -> None:
        self._sources = tuple(sources)
        self._turns = tuple(turns)
        # How many turns of the same policy come before each turn.
        self._before = [self._turns[:at].count(place) for at, place in enumerate(self._turns)]
        self.skipped = sum(source.skipped for source in sources)
        self.left_out = reduce(LeftOut.and_also, (source.left_out for source in sources))

    def __len__(self) -> int:
        return sum(map(len, self._sources))

    def left_out_lines(self) -> list[str]:
        return [line for source in self._sources for line in source.left_out_lines()]

    def all(self) -> tuple[Prompt, ...]:
        """Every prompt of every policy once."""
        return tuple(prompt for source in self._sources for prompt in source.all())

    def prompt(self, ordinal: int) -> Prompt:
        """The ordinal-th prompt ever admitted, from 0; without end."""
        if ordinal < 0:
            raise IndexError(f"prompt {ordinal}")
        rounds, at = divmod(ordinal, len(self._turns))
        place = self._turns[at]
        return self._sources[place].prompt(rounds * self._turns.count(place) + self._before[at])


def load_prompts_of_policies(
    policies: Sequence[PolicyConfig],
    cfg: DataConfig,
    tokenizer: Any,
    seed: int,
    room: int | None = None,
) -> PromptsOfPolicies:
    """Each policy's own file, read as `load_prompts` does; the prompts carry the policy's name, for
    their reward in a column ``policy``. Raises UserError for a file with another such column."""
    sources = []
    for place, policy in enumerate(policies):
        own = load_prompts(
            cfg.model_copy(update={"prompts": policy.prompts}), tokenizer, seed + place, room
        )
        named = [_of_policy(prompt, policy.name) for prompt in own.all()]
        sources.append(
            FilePromptSource(named, seed + place, cfg.shuffle, own.skipped, own.left_out)
        )
    return PromptsOfPolicies(sources, turns(policies))


def _of_policy(prompt: Prompt, name: str) -> Prompt:
    if prompt.metadata.get(POLICY, name) != name:
        raise UserError(
            f"the column {POLICY!r} says {prompt.metadata[POLICY]!r}, but the file is that of the "
            f"policy {name!r}",
            where=prompt.where,
            fix="give the column another name",
        )
    # The policy is part of the id: two of them may share a file.
    return replace(
        prompt,
        id=f"{name}-{prompt.id}",
        policy=name,
        metadata={**prompt.metadata, POLICY: name},
    )


def held_out_of_policies(prompts: Sequence[Prompt], names: Collection[str]) -> tuple[Prompt, ...]:
    """Held-out prompts, each for the policy that its own column ``policy`` names. Raises UserError
    for one that names none."""
    for prompt in prompts:
        if prompt.metadata.get(POLICY) not in names:
            raise UserError(
                f"the column {POLICY!r} says {prompt.metadata.get(POLICY)!r}, which is none of "
                f"[[policies]] ({', '.join(names)})",
                where=prompt.where,
                fix="say in each row which policy is to answer it",
            )
    return tuple(_of_policy(prompt, prompt.metadata[POLICY]) for prompt in prompts)
