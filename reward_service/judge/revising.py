"""Critique, then revision of completions, by principles of a constitution (Bai et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.contracts.records import Message
from reward_service.judge.questions import DATA, asked, json_object, text_schema
from reward_service.judge.records import Asker, Question, Unreadable

CRITIQUE = f"""You criticise one completion of a prompt by a principle. {DATA}
Principle: {{principle}}
Answer with one JSON object: "critique", in which way the completion breaks the principle, or that
it keeps it."""
REVISE = f"""You rewrite one completion of a prompt, so that it keeps a principle. {DATA}
Principle: {{principle}}
Use the critique. Change nothing that the principle does not ask for.
Answer with one JSON object: "revision", the whole new completion and nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A completion on its way: ``principles`` and ``critiques`` that it went through so far."""

    messages: tuple[Message, ...]
    text: str
    label: str = ""
    principles: tuple[str, ...] = ()
    critiques: tuple[str, ...] = ()


def revised(asker: Asker, drafts: Sequence[Draft], principles: Sequence[str]) -> list[Draft]:
    """Each draft, criticised and rewritten by the principle at its place. Raises what
    ``Asker.ask`` raises."""
    critiques = _texts(
        asker,
        [_critique(draft, principle) for draft, principle in zip(drafts, principles, strict=True)],
    )
    texts = _texts(
        asker,
        [
            _revision(draft, principle, critique)
            for draft, principle, critique in zip(drafts, principles, critiques, strict=True)
        ],
    )
    return [
        replace(
            draft,
            text=text,
            principles=(*draft.principles, principle),
            critiques=(*draft.critiques, critique),
        )
        for draft, principle, critique, text in zip(
            drafts, principles, critiques, texts, strict=True
        )
    ]


def _texts(asker: Asker, questions: Sequence[Question]) -> list[str]:
    found = dict(asker.ask(questions))
    return [found[place] for place in range(len(questions))]


def _critique(draft: Draft, principle: str) -> Question:
    return _question(CRITIQUE, draft, principle, {"COMPLETION": draft.text}, "critique")


def _revision(draft: Draft, principle: str, critique: str) -> Question:
    parts = {"COMPLETION": draft.text, "CRITIQUE": critique}
    return _question(REVISE, draft, principle, parts, "revision")


def _question(
    words: str, draft: Draft, principle: str, parts: dict[str, str], name: str
) -> Question:
    def read(text: str) -> str:
        tree = json_object(text)
        found = tree.get(name)
        if set(tree) != {name} or not isinstance(found, str) or not found.strip():
            raise Unreadable(f"expected one key, {name}, with a text")
        return found.strip()

    return Question(
        messages=asked(words.format(principle=principle), draft.messages, parts),
        read=read,
        schema=text_schema(name),
        label=draft.label,
    )
