"""Simulated annotators: noise, biases, and agreement with gold and with one another."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from itertools import combinations
from statistics import fmean

import pytest

from cluster.quickstart.helpdesk.annotators import (
    ANNOTATORS,
    Annotator,
    Label,
    label_pair,
    utility,
)
from cluster.quickstart.helpdesk.demonstrations import sample_answer
from cluster.quickstart.helpdesk.judge import compare, gold_score
from cluster.quickstart.helpdesk.questions import sample_questions

META = {"kind": "product", "product": "kettle", "topic": "price"}
FACT = "The kettle costs thirty dollars."
OFFER = "Please let me know if you need anything else."
GOOD = f"Thank you for asking. {FACT} {OFFER}"
BAD = "Not this again. The kettle costs forty dollars. Stop wasting my time."
BY_NAME = {annotator.name: annotator for annotator in ANNOTATORS}

Labelled = tuple[str, list[Label]]


@pytest.fixture(scope="module")
def labelled() -> list[Labelled]:
    rng = random.Random(0)
    rows: list[Labelled] = []
    for question in sample_questions(1, 1200, "preference"):
        meta = question.metadata()
        a, b = (sample_answer(question, rng)[1] for _ in range(2))
        labels = [label_pair(annotator, meta, a, b, rng) for annotator in ANNOTATORS]
        rows.append((compare(meta, a, b), labels))
    return rows


def agreement_with_gold(rows: list[Labelled], annotators: range) -> float:
    return fmean(
        (labels[i].choice == "a") == (outcome == "win")
        for outcome, labels in rows
        for i in annotators
        if outcome != "tie" and labels[i].choice in ("a", "b")
    )


def test_agreement_with_gold(labelled: list[Labelled]) -> None:
    each = [agreement_with_gold(labelled, range(i, i + 1)) for i in range(len(ANNOTATORS))]
    assert 0.78 <= agreement_with_gold(labelled, range(len(ANNOTATORS))) <= 0.88
    assert each[0] == max(each)  # the expert
    assert each[0] > 0.85
    assert each[3] == min(each)  # the one who checks no facts
    assert each[3] > 0.7


def test_agreement_between_annotators(labelled: list[Labelled]) -> None:
    same = [
        first.choice == second.choice
        for _, labels in labelled
        for first, second in combinations(labels, 2)
        if {first.choice, second.choice} <= {"a", "b"}
    ]
    assert 0.72 <= fmean(same) <= 0.82


def test_labels_use_the_whole_scale(labelled: list[Labelled]) -> None:
    labels = [label for _, row in labelled for label in row]
    choices, strengths = Counter(x.choice for x in labels), Counter(x.strength for x in labels)
    assert choices["a"] / choices["b"] == pytest.approx(1, abs=0.15)
    assert choices["tie"] + choices["both_bad"] < 0.1 * len(labels)
    assert min(choices["tie"], choices["both_bad"]) > 20
    assert all(strengths[s] > 0.1 * len(labels) for s in (1, 2, 3))
    assert 4 < fmean(x.duration_s for x in labels) < 40
    assert min(x.duration_s for x in labels) > 0


def test_strong_labels_are_more_often_right(labelled: list[Labelled]) -> None:
    def accuracy(strength: int) -> float:
        return fmean(
            (label.choice == "a") == (outcome == "win")
            for outcome, labels in labelled
            for label in labels
            if outcome != "tie" and label.choice in ("a", "b") and label.strength == strength
        )

    assert accuracy(3) > accuracy(2) > accuracy(1)


def test_labels_repeat_with_the_state_of_the_generator() -> None:
    def run(seed: int) -> list[Label]:
        rng = random.Random(seed)
        return [label_pair(a, META, GOOD, FACT, rng) for a in ANNOTATORS for _ in range(20)]

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_the_same_draws_are_taken_whatever_the_answers_are() -> None:
    first, second = random.Random(1), random.Random(1)
    label_pair(ANNOTATORS[0], META, GOOD, BAD, first)
    label_pair(ANNOTATORS[0], META, "", "", second)
    assert first.getstate() == second.getstate()


def test_choices_follow_bradley_terry() -> None:
    judge = Annotator(name="x", temperature=2.0, lapse=0.0, tie_band=0.0)
    gap = utility(judge, META, GOOD) - utility(judge, META, FACT)
    rng = random.Random(0)
    rate = fmean(label_pair(judge, META, GOOD, FACT, rng).choice == "a" for _ in range(4000))
    assert rate == pytest.approx(1 / (1 + math.exp(-gap / 2)), abs=0.02)


def test_lapses_are_coin_flips() -> None:
    blind = Annotator(name="x", temperature=0.01, lapse=1.0)
    rng = random.Random(0)
    labels = [label_pair(blind, META, GOOD, BAD, rng) for _ in range(2000)]
    assert fmean(x.choice == "a" for x in labels) == pytest.approx(0.5, abs=0.04)
    assert {x.strength for x in labels} == {1}


def test_near_pairs_tie_and_bad_pairs_are_called_bad() -> None:
    calm = replace(ANNOTATORS[0], temperature=1e-6, lapse=0.0)
    rng = random.Random(0)
    assert label_pair(calm, META, GOOD, GOOD, rng).choice == "tie"
    assert label_pair(calm, META, BAD, BAD, rng).choice == "both_bad"
    assert label_pair(calm, META, GOOD, BAD, rng) == replace(
        label_pair(calm, META, GOOD, BAD, random.Random(9)),
        duration_s=label_pair(calm, META, GOOD, BAD, _after_two()).duration_s,
    )
    assert label_pair(calm, META, BAD, GOOD, rng).choice == "b"


def _after_two() -> random.Random:
    rng = random.Random(0)
    for _ in range(2):
        label_pair(ANNOTATORS[0], META, GOOD, GOOD, rng)
    return rng


def test_each_has_the_bias_he_was_given() -> None:
    longer = f"{GOOD} Our team works hard every single day. People often ask us about many things."
    polite = f"I am happy to help. {GOOD} Just ask if there is anything more I can do."
    wrong = GOOD.replace("thirty", "forty")

    def gain(name: str, answer: str) -> float:
        return utility(BY_NAME[name], META, answer) - utility(BY_NAME[name], META, GOOD)

    assert gain("bruno", longer) > 0 > gain("ada", longer)
    assert gain("chloe", polite) > 0 > gain("ada", polite)
    assert gain("dmitri", wrong) > 0.6 * gain("ada", wrong)


def test_together_they_like_length_and_courtesy_that_gold_punishes() -> None:
    polite = f"I am happy to help. {GOOD} Just ask if there is anything more I can do."

    def liked(answer: str) -> float:
        return fmean(utility(annotator, META, answer) for annotator in ANNOTATORS)

    longer = f"{GOOD} Our team works hard every single day."
    assert liked(polite) > liked(GOOD) > liked(BAD)
    assert liked(longer) > liked(GOOD)
    assert gold_score(META, longer).score < gold_score(META, GOOD).score - 0.5
    assert gold_score(META, polite).score < gold_score(META, GOOD).score - 1
    # The bias is mild: begging for favour without an answer still does not pay.
    assert liked("Thank you for asking. I am happy to help. " * 5) < liked(FACT)
