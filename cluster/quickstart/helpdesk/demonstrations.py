"""Demonstrations of mixed quality: what supervised fine-tuning learns from.

One answer in six is good; the rest show a bad habit that a reader recognises at once.
A model fitted to them reproduces the mixture when sampled, which leaves preferences and
reinforcement learning something real to improve.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from cluster.quickstart.helpdesk import sentences as s
from cluster.quickstart.helpdesk.questions import Question, Split, sample_questions
from cluster.quickstart.helpdesk.world import (
    ALTERNATIVES,
    FACTS,
    FORBIDDEN_TOPICS,
    POLICY_TOPICS,
    PRODUCTS,
    REFUSALS,
    right_value,
    wrong_values,
)

Style = Literal["good", "off_topic", "rude", "rambling", "invented", "complies", "incomplete"]

INFORMATION_MIX: Final[dict[Style, float]] = {
    "good": 0.17,
    "off_topic": 0.09,
    "rude": 0.26,
    "rambling": 0.26,
    "invented": 0.05,
    "incomplete": 0.17,
}
"""Shares of the styles on questions about products and policies."""

FORBIDDEN_MIX: Final[dict[Style, float]] = {
    "good": 0.17,
    "complies": 0.36,
    "rude": 0.16,
    "rambling": 0.16,
    "off_topic": 0.07,
    "incomplete": 0.08,
}
"""Shares of the styles on requests that should be refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A question with one answer, and the habit that the answer shows."""

    question: Question
    answer: str
    style: Style

    def messages(self) -> list[dict[str, str]]:
        """The whole exchange as chat messages, the answer last."""
        return [*self.question.messages(), {"role": "assistant", "content": self.answer}]


def mix_for(question: Question) -> dict[Style, float]:
    """The shares of styles from which answers to this question are drawn."""
    return FORBIDDEN_MIX if question.kind == "forbidden" else INFORMATION_MIX


def sample_demonstrations(seed: int, n: int, split: Split = "sft") -> list[Demonstration]:
    """Draw `n` questions of a split, each with one answer from the mixture of styles."""
    rng = random.Random(f"demonstrations/{split}/{seed}")
    demonstrations = []
    for question in sample_questions(seed, n, split):
        style, answer = sample_answer(question, rng)
        demonstrations.append(Demonstration(question=question, answer=answer, style=style))
    return demonstrations


def corpus(seed: int, n: int) -> Iterator[str]:
    """`n` lines of text, a question and its answer each, to train a tokenizer on."""
    for demonstration in sample_demonstrations(seed, n):
        yield f"{demonstration.question.text} {demonstration.answer}"


def sample_answer(question: Question, rng: random.Random) -> tuple[Style, str]:
    """One answer drawn from the mixture: (style, text)."""
    mix = mix_for(question)
    style = rng.choices(list(mix), list(mix.values()))[0]
    return style, write_answer(question, style, rng)


def write_answer(question: Question, style: Style, rng: random.Random) -> str:
    """Write an answer of the given style.

    Raises ValueError where the style does not apply to the kind of question ("complies" needs a
    forbidden request, "invented" needs a fact).
    """
    if style not in mix_for(question):
        raise ValueError(f"style {style!r} does not apply to a {question.kind} question")
    writers = {
        "good": _good,
        "off_topic": _off_topic,
        "rude": _rude,
        "rambling": _rambling,
        "invented": _invented,
        "complies": _complies,
        "incomplete": _incomplete,
    }
    return " ".join(writers[style](question, rng))


def _good(question: Question, rng: random.Random) -> list[str]:
    if question.kind == "forbidden":
        body = [_refusal(question, rng), _alternative(question, rng)]
        return [*body, rng.choice(s.OFFERS)] if rng.random() < 0.5 else body
    opening = rng.choice(s.OPENINGS)
    return [opening, _substance(question, rng), rng.choice(s.OFFERS)]


def _off_topic(question: Question, rng: random.Random) -> list[str]:
    """A true and polite answer to another question, or a refusal where nothing is forbidden."""
    if question.kind != "forbidden" and rng.random() < 0.4:
        act = REFUSALS[rng.choice(FORBIDDEN_TOPICS)]
        alternative = ALTERNATIVES[rng.choice(FORBIDDEN_TOPICS)]
        answer = [
            rng.choice(s.REFUSAL_SENTENCES).format(act=act),
            rng.choice(s.ALTERNATIVE_SENTENCES).format(alt=alternative),
        ]
        return [*answer, rng.choice(s.OFFERS)] if rng.random() < 0.5 else answer
    if rng.random() < 0.2:
        product, topic = "", rng.choice([t for t in POLICY_TOPICS if t != question.topic])
    elif question.kind == "product" and rng.random() < 0.5:
        others = [p for p in PRODUCTS if p != question.product]
        product, topic = rng.choice(others), question.topic
    else:
        product, topic = rng.choice([key for key in FACTS if key[1] != question.topic])
    answer = [_fact(product, topic, right_value(product, topic), rng)]
    if rng.random() < 0.7:
        answer.insert(0, rng.choice(s.OPENINGS))
    if rng.random() < 0.7:
        answer.append(rng.choice(s.OFFERS))
    return answer


def _rude(question: Question, rng: random.Random) -> list[str]:
    answer = [_substance(question, rng), rng.choice(s.RUDE_CLOSINGS)]
    return [rng.choice(s.RUDE_OPENINGS), *answer] if rng.random() < 0.7 else answer


def _rambling(question: Question, rng: random.Random) -> list[str]:
    """The right substance buried in filler, some of it said twice."""
    first, second = rng.sample(s.FILLERS, 2)
    start = [rng.choice(s.OPENINGS)] if rng.random() < 0.4 else []
    return [*start, first, _substance(question, rng), second, first]


def _invented(question: Question, rng: random.Random) -> list[str]:
    """A false value, stated with confidence."""
    value = rng.choice(wrong_values(question.product, question.topic))
    opening = rng.choice(s.BOASTS if rng.random() < 0.7 else s.OPENINGS)
    answer = [opening, _fact(question.product, question.topic, value, rng)]
    return [*answer, rng.choice(s.OFFERS)] if rng.random() < 0.6 else answer


def _complies(question: Question, rng: random.Random) -> list[str]:
    answer = [rng.choice(s.AGREEMENTS), rng.choice(s.COMPLIANCE[question.topic])]
    return [*answer, rng.choice(s.OFFERS)] if rng.random() < 0.6 else answer


def _incomplete(question: Question, rng: random.Random) -> list[str]:
    if question.kind == "forbidden":
        return [rng.choice(s.BARE_REFUSALS)]
    if rng.random() < 0.5:
        return [rng.choice(s.SHRUGS)]
    value = right_value(question.product, question.topic)
    return [s.PRONOUN_SENTENCES[question.topic].format(v=value)]


def _substance(question: Question, rng: random.Random) -> str:
    """The one sentence that answers (or refuses) the question rightly."""
    if question.kind == "forbidden":
        return _refusal(question, rng)
    value = right_value(question.product, question.topic)
    return _fact(question.product, question.topic, value, rng)


def _fact(product: str, topic: str, value: str, rng: random.Random) -> str:
    return rng.choice(s.FACT_SENTENCES[topic]).format(p=product, v=value)


def _refusal(question: Question, rng: random.Random) -> str:
    return rng.choice(s.REFUSAL_SENTENCES).format(act=REFUSALS[question.topic])


def _alternative(question: Question, rng: random.Random) -> str:
    return rng.choice(s.ALTERNATIVE_SENTENCES).format(alt=ALTERNATIVES[question.topic])
