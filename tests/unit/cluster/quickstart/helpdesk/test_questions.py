"""The world's facts, and questions that never leak from one split to another."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import get_args

import pytest

from cluster.quickstart.helpdesk import sentences
from cluster.quickstart.helpdesk.questions import (
    KIND_WEIGHTS,
    SPLIT_PERCENT,
    Split,
    all_questions,
    sample_questions,
    split_of,
)
from cluster.quickstart.helpdesk.world import (
    FACTS,
    POLICY_TOPICS,
    PRODUCT_TOPICS,
    PRODUCTS,
    TOPICS_OF,
    VALUES,
    right_value,
    wrong_values,
)

SPLITS: tuple[Split, ...] = get_args(Split)
QUICKSTART: dict[Split, int] = {"sft": 16000, "preference": 1600, "rl": 1600, "eval": 400}
"""What the quickstart draws of each split at scale 1."""


def test_every_product_has_one_value_for_every_topic_and_all_values_are_used() -> None:
    assert set(FACTS) == {(p, t) for p in PRODUCTS for t in PRODUCT_TOPICS}
    for topic in PRODUCT_TOPICS:
        assert {FACTS[p, topic] for p in PRODUCTS} == set(VALUES[topic])


def test_products_differ_and_no_topic_can_be_read_off_another() -> None:
    rows = [tuple(FACTS[p, t] for t in PRODUCT_TOPICS) for p in PRODUCTS]
    assert len(set(rows)) == len(rows)
    for first in PRODUCT_TOPICS:
        for second in PRODUCT_TOPICS:
            if first != second:
                seen = {(FACTS[p, first], FACTS[p, second]) for p in PRODUCTS}
                assert len(seen) > len(VALUES[first])


def test_right_and_wrong_values_divide_the_topic() -> None:
    assert right_value("kettle", "price") == "thirty dollars"
    assert right_value("", "location") == "on Mill Street"
    for product, topic in [*FACTS, *(("", t) for t in POLICY_TOPICS)]:
        wrong = wrong_values(product, topic)
        assert right_value(product, topic) not in wrong
        assert {*wrong, right_value(product, topic)} == set(VALUES[topic])
    with pytest.raises(KeyError, match="not a policy"):
        right_value("", "price")


def test_splits_share_no_text_and_are_large_enough() -> None:
    texts = {split: {q.text for q in all_questions(split)} for split in SPLITS}
    union = set().union(*texts.values())
    assert len(union) == sum(map(len, texts.values()))
    assert all(split_of(text) == split for split in SPLITS for text in texts[split])
    for split in SPLITS:
        share = 100 * len(texts[split]) / len(union)
        assert share == pytest.approx(SPLIT_PERCENT[split], abs=2)
    assert len(texts["eval"]) >= 400
    assert min(len(texts["preference"]), len(texts["rl"]), len(texts["sft"])) >= 1500


def test_the_hash_that_splits_is_pinned() -> None:
    # A change here would silently move evaluation prompts into old training data.
    assert split_of("How much does the kettle cost? Thank you.") == "sft"
    assert [len(all_questions(split)) for split in SPLITS] == [3394, 2085, 2116, 839]


def test_question_texts_are_well_formed() -> None:
    for split in SPLITS:
        for question in all_questions(split):
            assert 8 <= len(question.text.split()) <= 20
            assert question.text[0].isupper()
            assert question.text[-1] in ".?"
            assert question.topic in TOPICS_OF[question.kind]
            assert question.product in question.text
            assert bool(question.product) == (question.kind == "product")


@pytest.mark.parametrize("split", SPLITS)
def test_sampling_is_deterministic_and_distinct(split: Split) -> None:
    n = 300
    drawn = sample_questions(7, n, split)
    assert drawn == sample_questions(7, n, split)
    assert drawn != sample_questions(8, n, split)
    assert drawn == sample_questions(7, 2 * n, split)[:n]
    assert len({q.text for q in drawn}) == len({q.id for q in drawn}) == n
    assert all(split_of(q.text) == split for q in drawn)


@pytest.mark.parametrize("split", SPLITS)
def test_kinds_keep_their_shares_although_some_have_few_texts(split: Split) -> None:
    n = QUICKSTART[split]
    drawn = sample_questions(7, n, split)
    for part in (drawn, drawn[: n // 2], drawn[n // 2 :]):
        kinds = Counter(q.kind for q in part)
        for kind, weight in KIND_WEIGHTS.items():
            deviation = math.sqrt(weight * (1 - weight) / len(part))
            assert kinds[kind] / len(part) == pytest.approx(weight, abs=3 * deviation)


@pytest.mark.parametrize("seed", range(5))
def test_evaluation_prompts_are_all_but_distinct(seed: int) -> None:
    # The interval of the win rate takes each row for a prompt of its own.
    drawn = sample_questions(seed, QUICKSTART["eval"], "eval")
    assert len({q.text for q in drawn}) >= 0.95 * len(drawn)


@pytest.mark.parametrize("split", SPLITS)
def test_few_draws_cover_every_fact(split: Split) -> None:
    cells = {(q.product, q.topic) for q in sample_questions(3, 300, split)}
    assert cells == {
        (p, t)
        for kind in TOPICS_OF
        for t in TOPICS_OF[kind]
        for p in (PRODUCTS if kind == "product" else ("",))
    }


def test_a_used_up_kind_begins_again_once_every_text_was_drawn() -> None:
    everything, drawn = all_questions("eval"), sample_questions(0, 3000, "eval")
    for kind in KIND_WEIGHTS:
        texts = {q.text for q in everything if q.kind == kind}
        own = [q.text for q in drawn if q.kind == kind]
        passes = [own[i : i + len(texts)] for i in range(0, len(own), len(texts))]
        assert len(passes) >= 3
        assert all(sorted(one) == sorted(texts) for one in passes[:-1])
        assert len(set(passes[-1])) == len(passes[-1])
        assert passes[0] != passes[1]


def test_bad_arguments_are_named() -> None:
    assert sample_questions(0, 0, "rl") == []
    with pytest.raises(ValueError, match="n must be 0 or more, not -1"):
        sample_questions(0, -1, "rl")
    with pytest.raises(ValueError, match="unknown split 'test'"):
        sample_questions(0, 1, "test")  # type: ignore[arg-type]


def test_the_vocabulary_is_small() -> None:
    texts = [q.text for split in SPLITS for q in all_questions(split)]
    texts += list(sentences.all_sentences())
    words = {token for text in texts for token in sentences.tokens_of(text) if token.isalpha()}
    assert 200 <= len(words) <= 350


def test_ngrams_pad_each_sentence() -> None:
    assert sentences.ngrams(["no", "."], 2) == [("<s>", "no"), ("no", "."), (".", "</s>")]
    assert all(a[1] == b[0] for a, b in pairwise(sentences.ngrams(list("abcd"), 2)))
