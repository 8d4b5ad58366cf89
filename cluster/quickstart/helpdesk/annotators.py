"""Simulated people who label pairs: each sees the features of an answer in his own way.

As a group they like length and courtesy a little more than the gold judge does. A policy that
chases their reward without a KL penalty therefore drifts to long, over-polite answers, which is
the over-optimisation that the monitors are there to catch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from cluster.quickstart.helpdesk.judge import parts_of
from cluster.quickstart.helpdesk.parsing import read_answer

Choice = Literal["a", "b", "tie", "both_bad"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotator:
    """One simulated labeller.

    He prefers `a` with the Bradley-Terry probability sigmoid((u_a - u_b) / temperature), and with
    probability `lapse` clicks without looking. Weights multiply the parts that the judge names.
    """

    name: str
    temperature: float
    lapse: float
    relevance: float = 2.0
    correctness: float = 4.0
    courtesy: float = 1.5
    concision: float = 1.5
    wrong: float = 3.0
    rudeness: float = 2.5
    repetition: float = 2.5
    padding: float = 0.2
    clumsiness: float = 5.0
    """Weight of broken language; an unfinished answer costs a fifth of it."""
    per_ten_words: float = 0.0
    """Utility of ten more words, up to 100 words."""
    per_courtesy: float = 0.0
    """Utility of one more courteous sentence, up to 8."""
    tie_band: float = 0.25
    """Felt differences below this are called a tie."""
    patience: float = 1.0
    """Multiplies the time spent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """A judgement of one pair: the choice, how strong (1 slight to 3 clear), seconds it took."""

    choice: Choice
    strength: int
    duration_s: float


ANNOTATORS: Final[tuple[Annotator, ...]] = (
    Annotator(name="ada", temperature=0.8, lapse=0.02, padding=1.5, patience=1.3),
    Annotator(
        name="bruno", temperature=1.1, lapse=0.04, concision=0.2, repetition=0.6, per_ten_words=0.8
    ),
    Annotator(
        name="chloe", temperature=1.1, lapse=0.04, courtesy=2.5, rudeness=3.5, per_courtesy=0.6
    ),
    Annotator(
        name="dmitri",
        temperature=1.3,
        lapse=0.06,
        correctness=2.0,
        concision=0.7,
        wrong=1.0,
        per_ten_words=0.35,
        patience=0.6,
    ),
    Annotator(
        name="emi", temperature=1.1, lapse=0.04, concision=1.0, per_ten_words=0.4, per_courtesy=0.2
    ),
)
"""A careful expert, a lover of length, one dazzled by courtesy, one who checks no facts, and one
in between."""

_BAD_BELOW: Final = 2.0
_BAD_BAND: Final = 0.6
"""Two answers both below the first figure and felt nearer than the second are "both bad"."""


def utility(annotator: Annotator, prompt_meta: Mapping[str, str], answer: str) -> float:
    """How much the annotator likes an answer, before noise.

    Raises ValueError where the metadata is not a help desk question's.
    """
    features = read_answer(prompt_meta, answer)
    parts = parts_of(prompt_meta["kind"], features)
    return (
        annotator.relevance * parts["relevance"]
        + annotator.correctness * parts["correctness"]
        + annotator.courtesy * parts["courtesy"]
        + annotator.concision * parts["concision"]
        - annotator.wrong * parts["wrong"]
        - annotator.rudeness * parts["rudeness"]
        - annotator.repetition * parts["repetition"]
        - annotator.padding * parts["padding"]
        - annotator.clumsiness * (1.0 - parts["fluency"] + 0.2 * (1.0 - parts["finished"]))
        + annotator.per_ten_words * min(features.words, 100) / 10.0
        + annotator.per_courtesy * min(features.courteous, 8)
    )


def label_pair(
    annotator: Annotator,
    prompt_meta: Mapping[str, str],
    answer_a: str,
    answer_b: str,
    rng: random.Random,
) -> Label:
    """One noisy label of the pair (a, b), reproducible from the state of `rng`.

    The same number of draws is taken whatever the answers are. Raises ValueError where the
    metadata is not a help desk question's.
    """
    uniform = min(max(rng.random(), 1e-12), 1.0 - 1e-12)
    lapsed, blind = rng.random() < annotator.lapse, rng.random() < 0.5
    pace = rng.lognormvariate(0.0, 0.3)
    first = utility(annotator, prompt_meta, answer_a)
    second = utility(annotator, prompt_meta, answer_b)
    # A logistic disturbance of the difference makes the sign a Bradley-Terry choice.
    noise = annotator.temperature * math.log(uniform / (1.0 - uniform))
    felt = first - second + noise
    words = len(answer_a.split()) + len(answer_b.split())
    hesitation = 4.0 / (1.0 + abs(felt))
    duration = annotator.patience * pace * (2.0 + 0.25 * words + hesitation)
    if lapsed:
        return Label(choice="a" if blind else "b", strength=1, duration_s=round(0.4 * duration, 2))
    if max(first, second) < _BAD_BELOW and abs(felt) < _BAD_BAND:
        return Label(choice="both_bad", strength=1, duration_s=round(duration, 2))
    if abs(felt) < annotator.tie_band:
        return Label(choice="tie", strength=1, duration_s=round(duration, 2))
    strength = 1 if abs(felt) < 1.5 else 2 if abs(felt) < 4.0 else 3
    return Label(choice="a" if felt > 0 else "b", strength=strength, duration_s=round(duration, 2))
