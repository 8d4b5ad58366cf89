"""What policies wrote for the same prompts, and which completions are compared. Pure, and a file.

completions.jsonl   one row per completion; also a file that `accord label` reads
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from cluster.contracts.durable import write_text
from cluster.contracts.records import Completion, Message, Prompt, Rollout, VersionSpan
from cluster.contracts.rows.question_sets import (
    CATEGORY,
    LATER_REFERENCES,
    LATER_TURNS,
    REFERENCE,
)

COMPLETIONS = "completions.jsonl"


@dataclass(frozen=True, slots=True)
class Written:
    """``turns[t][p]``: the completions of policy p in turn t, in the same order for every policy.
    ``names``: of the policies."""

    names: tuple[str, ...]
    turns: tuple[tuple[tuple[Rollout, ...], ...], ...]

    def of(self, policy: int) -> list[Rollout]:
        """All turns, one after the other."""
        return [rollout for turn in self.turns for rollout in turn[policy]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two completions of one prompt. ``left``, ``right``: the policies that wrote ``a`` and ``b``.

    ``place``: of both in ``Written.of``. ``messages``: what the policies have in common; in a later
    turn, ``a`` and ``b`` hold all that was said since. ``question``: the id of the prompt.
    """

    left: int
    right: int
    place: int
    turn: int
    question: str
    messages: tuple[Message, ...]
    a: str
    b: str
    category: str
    reference: str
    label: str

    @property
    def equal(self) -> bool:
        return self.a.strip() == self.b.strip()


def pairings(policies: int, *, against_last: bool) -> list[tuple[int, int]]:
    """Every two policies, or each of them with the last one, the baseline."""
    if against_last:
        return [(i, policies - 1) for i in range(policies - 1)]
    return list(combinations(range(policies), 2))


def comparisons(written: Written, pairs: Sequence[tuple[int, int]]) -> list[Comparison]:
    found = []
    for left, right in pairs:
        place = 0
        for turn, completions in enumerate(written.turns):
            for one, other in zip(completions[left], completions[right], strict=True):
                found.append(_comparison(left, right, place, turn, one, other))
                place += 1
    return found


def _comparison(
    left: int, right: int, place: int, turn: int, one: Rollout, other: Rollout
) -> Comparison:
    prompt = other.prompt
    later = 2 * turn
    category, reference = (str(prompt.metadata.get(key) or "") for key in (CATEGORY, REFERENCE))
    where = prompt.where or prompt.id
    return Comparison(
        left=left,
        right=right,
        place=place,
        turn=turn,
        question=question_of(prompt),
        messages=prompt.messages[: len(prompt.messages) - later],
        a=_since(one, later),
        b=_since(other, later),
        category=category,
        reference=reference,
        label=f"prompt {where}" + (f", turn {turn + 1}" if turn else ""),
    )


def _since(rollout: Rollout, later: int) -> str:
    """The completion; in a later turn, after all that policy and user have said before it."""
    if not later:
        return rollout.text
    parts = [
        message["content"] if n == 0 else f"{message['role'].capitalize()}: {message['content']}"
        for n, message in enumerate(rollout.prompt.messages[-later:])
    ]
    return "\n\n".join([*parts, f"Assistant: {rollout.text}"])


# -- later turns -----------------------------------------------------------------------------------


def question_of(prompt: Prompt) -> str:
    """The id of the first turn's prompt."""
    return prompt.id.partition("/")[0]


def next_turn(rollout: Rollout, turn: int) -> tuple[Message, ...] | None:
    """The messages of ``turn`` (from 1, the one after the first), which follow a completion of the
    turn before; None where the question has no such turn."""
    later = rollout.prompt.metadata.get(LATER_TURNS) or ()
    if len(later) < turn:
        return None
    said = {"role": "assistant", "content": rollout.text}
    return (*rollout.prompt.messages, said, {"role": "user", "content": later[turn - 1]})


def turn_prompt(
    rollout: Rollout, turn: int, messages: tuple[Message, ...], tokens: Sequence[int]
) -> Prompt:
    before = rollout.prompt
    references = before.metadata.get(LATER_REFERENCES) or ()
    reference = references[turn - 1] if len(references) >= turn else ""
    return replace(
        before,
        id=f"{question_of(before)}/{turn + 1}#{rollout.sample_index}",
        messages=messages,
        token_ids=tuple(tokens),
        metadata={**before.metadata, REFERENCE: reference},
    )


# -- the file --------------------------------------------------------------------------------------


def write_completions(directory: Path, written: Written) -> None:
    """Complete, or not there at all."""
    rows = [
        json.dumps(_row(name, turn, rollout), ensure_ascii=False, default=str)
        for turn, completions in enumerate(written.turns)
        for name, own in zip(written.names, completions, strict=True)
        for rollout in own
    ]
    write_text(directory / COMPLETIONS, "".join(row + "\n" for row in rows))


def read_completions(directory: Path, names: Sequence[str]) -> Written:
    """What ``write_completions`` wrote."""
    found: dict[int, dict[str, list[Rollout]]] = {}
    for line in (directory / COMPLETIONS).read_text("utf-8").split("\n"):
        if line:
            row = json.loads(line)
            own = found.setdefault(row["turn"], {}).setdefault(row["policy_version"], [])
            own.append(_rollout(row))
    turns = [found[turn] for turn in sorted(found)]
    return Written(
        tuple(names), tuple(tuple(tuple(turn[name]) for name in names) for turn in turns)
    )


def _row(name: str, turn: int, rollout: Rollout) -> dict[str, Any]:
    prompt, completion = rollout.prompt, rollout.completion
    return {
        "policy_version": name,
        "turn": turn,
        "prompt": [dict(message) for message in prompt.messages],
        "completion": rollout.text,
        "sample": rollout.sample_index,
        "finish_reason": completion.finish_reason,
        "prompt_id": prompt.id,
        "prompt_tokens": list(prompt.token_ids),
        "tokens": list(completion.token_ids),
        "logprobs": [round(value, 6) for value in completion.logprobs],
        "metadata": dict(prompt.metadata),
        "where": prompt.where,
    }


def _rollout(row: dict[str, Any]) -> Rollout:
    return Rollout(
        prompt=Prompt(
            id=row["prompt_id"],
            messages=tuple(row["prompt"]),
            token_ids=tuple(row["prompt_tokens"]),
            metadata=row["metadata"],
            where=row["where"],
        ),
        completion=Completion(
            token_ids=row["tokens"],
            logprobs=row["logprobs"],
            versions=(VersionSpan(version=0, start=0, end=len(row["tokens"])),),
            finish_reason=row["finish_reason"],
        ),
        sample_index=row["sample"],
        text=row["completion"],
    )
