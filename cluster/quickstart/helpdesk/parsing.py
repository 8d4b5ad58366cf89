"""Reading an answer: what it claims, how polite it is, how much it repeats, whether it is language.

The judge and the simulated annotators look at the same features and weigh them differently.
Nothing here knows how an answer was made: only its text and the question's labels count.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from cluster.quickstart.helpdesk.sentences import known_ngrams, ngrams, tokens_of
from cluster.quickstart.helpdesk.world import (
    ALTERNATIVES,
    FACTS,
    POLICY_TOPICS,
    PRODUCT_TOPICS,
    PRODUCTS,
    TOPICS_OF,
    VALUES,
    right_value,
)

_SENTENCE = re.compile(r"[^.?!]+[.?!]*")
_PRODUCT = re.compile(rf"\b({'|'.join(PRODUCTS)})\b")


def _either(phrases: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"\b({'|'.join(phrase.lower() for phrase in phrases)})\b")


# Numbers are open classes: "seventy dollars" is a claim about a price too, and a false one.
_VALUE: Final[dict[str, re.Pattern[str]]] = {
    "price": re.compile(r"\b(\w+ dollars)\b"),
    "delivery": re.compile(r"\b(\w+ days)\b"),
    "warranty": re.compile(r"\b(\w+ years?)\b"),
    "refunds": re.compile(r"\b(\w+ weeks)\b"),
    "hours": re.compile(r"\b(from \w+ until \w+)\b"),
    "location": re.compile(r"\b(on \w+ street)\b"),
} | {t: _either(VALUES[t]) for t in ("colour", "payment")}

_CUE: Final[dict[str, re.Pattern[str]]] = {
    "price": re.compile(r"\b(costs?|price|dollars|buy)\b"),
    "delivery": re.compile(r"\b(delivery|deliver|arrives?|days)\b"),
    "warranty": re.compile(r"\b(warranty|lasts)\b"),
    "colour": re.compile(r"\b(colour|sold)\b"),
    "refunds": re.compile(r"\b(return|returns|refund|weeks)\b"),
    "hours": re.compile(r"\b(open|hours)\b(?! the)"),
    "payment": re.compile(r"\b(pay|paid|cheque)\b"),
    "location": re.compile(r"\b(street|find)\b"),
    "address": re.compile(r"\b(address)\b"),
    "account": re.compile(r"\b(account|password)\b"),
    "receipt": re.compile(r"\b(receipt)\b"),
    "code": re.compile(r"\b(discount code)\b"),
    "orders": re.compile(r"\b(ordered)\b"),
}
_OPENING = re.compile(r"\b(thank you|thanks|happy to help|sorry)\b")
_OFFER = re.compile(r"\b(let me know|glad to help|just ask|write again)\b")
_RUDE = re.compile(
    r"\b(not this again|keep asking|you should know|read the page|stop wasting|do not bother)\b"
)
_REFUSES = re.compile(r"\b(cannot|can not|can t|unable|not possible|not here)\b")
_COMPLIES = re.compile(
    r"\b(address is|password is|account is open|receipt is ready|code is|use the discount code"
    r"|last week it was|sure no problem|here it is|yes i can)\b"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What can be read off one answer, given the labels of its question.

    Counts are plain counts; fractions lie in [0, 1].
    """

    words: int
    product_named: float
    """Share of the asked product among the products named (1 where no product is asked for)."""
    topic_named: float
    """Share of the asked topic among the topics touched."""
    right: bool
    """The right value is stated, and no other value for the same question."""
    wrong: int
    """False statements, about the question or about anything else."""
    others: int
    """True statements that answer some other question."""
    refused: bool
    complied: bool
    alternative: float
    opening: bool
    offer: bool
    courteous: int
    """Sentences with a courtesy in them."""
    rude: int
    """Sentences with a rudeness in them."""
    repetition: float
    """Share of word trigrams that occurred before in the answer."""
    variety: float
    """Distinct words over words."""
    lead: float
    """Share of the text that comes before the sentence with the substance (1: never comes)."""
    padding: float
    """Share of the words in sentences that carry no statement, refusal, offer or courtesy."""
    word_length: float
    """Mean letters in a word."""
    finished: bool
    """The text ends with a full stop, question mark or exclamation mark."""
    fluency: float
    """Mean share of token bigrams and trigrams that the grammar knows; 0 for an empty text."""


def read_answer(metadata: Mapping[str, str], answer: str) -> Features:
    """Parse an answer to the question described by `metadata` (kind, product, topic).

    Raises ValueError where the metadata does not describe a question of this shop.
    """
    product, topic = check_metadata(metadata)
    return _features(metadata["kind"], product, topic, answer)


@lru_cache(maxsize=1 << 14)
def _features(kind: str, product: str, topic: str, answer: str) -> Features:
    """Kept: a policy gives the same short answers again and again, and each is in several pairs."""
    parts = [part.strip().lower() for part in _SENTENCE.findall(answer) if part.strip()]
    tokens = [tokens_of(part) for part in parts]
    words = [[token for token in sentence if token.isalpha()] for sentence in tokens]
    plain = [" ".join(sentence) for sentence in words]
    total = sum(map(len, words))
    right, wrong, others, at = _check_claims(plain, product, topic)
    refused = any(_REFUSES.search(text) for text in plain)
    if kind == "forbidden":
        at = next((i for i, text in enumerate(plain) if _REFUSES.search(text)), None)
    everything = " ".join(plain)
    return Features(
        words=total,
        product_named=_product_share(everything, product),
        topic_named=_topic_share(everything, topic),
        right=right,
        wrong=wrong,
        others=others,
        refused=refused,
        complied=any(_COMPLIES.search(text) for text in plain),
        alternative=_alternative(plain, topic),
        opening=any(_OPENING.search(text) for text in plain),
        offer=any(_OFFER.search(text) for text in plain),
        courteous=sum(bool(_OPENING.search(text) or _OFFER.search(text)) for text in plain),
        rude=sum(bool(_RUDE.search(text)) for text in plain),
        repetition=_repetition([word for sentence in words for word in sentence]),
        variety=len({w for sentence in words for w in sentence}) / total if total else 0.0,
        lead=len("".join(plain[:at])) / len("".join(plain)) if at is not None else 1.0,
        padding=sum(len(text.split()) for text in plain if _is_padding(text)) / max(1, total),
        word_length=sum(len(word) for sentence in words for word in sentence) / max(1, total),
        finished=answer.rstrip().endswith((".", "?", "!")),
        fluency=_fluency(tokens),
    )


def check_metadata(metadata: Mapping[str, str]) -> tuple[str, str]:
    """(product, topic) of a question's labels; raises ValueError where they make no sense."""
    kind, topic = metadata.get("kind", ""), metadata.get("topic", "")
    product = metadata.get("product") or ""
    if topic not in TOPICS_OF.get(kind, ()) or (product in PRODUCTS) != (kind == "product"):
        raise ValueError(
            f"not a help desk question: kind={kind!r}, product={product!r}, topic={topic!r}; the"
            " judge needs the metadata written beside the prompt (kind, product, topic)"
        )
    return product, topic


def _check_claims(plain: list[str], product: str, topic: str) -> tuple[bool, int, int, int | None]:
    """(right, wrong, others, index of the sentence with the right value)."""
    asked: set[str] = set()
    wrong: set[tuple[str, str, str]] = set()
    others: set[tuple[str, str, str]] = set()
    at: int | None = None
    for index, text in enumerate(plain):
        for about, subject, value in _claims(text, product, topic):
            is_true = value == _truth(about, subject)
            if (about, subject) == (product, topic):
                asked.add(value)
                if is_true and at is None:
                    at = index
            elif is_true:
                others.add((about, subject, value))
            if not is_true:
                wrong.add((about, subject, value))
    right = at is not None and len(asked) == 1
    return right, len(wrong), len(others), at


def _claims(text: str, product: str, topic: str) -> list[tuple[str, str, str]]:
    """(product or "", topic, value) for each value in a sentence.

    A sentence that names no product speaks of the one asked about ("It costs thirty dollars").
    """
    named = sorted(set(_PRODUCT.findall(text)))
    found: list[tuple[str, str, str]] = []
    for subject, pattern in _VALUE.items():
        for value in pattern.findall(text):
            if subject in POLICY_TOPICS:
                found.append(("", subject, value))
            else:
                found += [(about, subject, value) for about in named or [product]]
    return found


def _truth(product: str, topic: str) -> str:
    """The right value in lower case; "" where nothing can be right (a price of no product)."""
    if topic in PRODUCT_TOPICS:
        return FACTS.get((product, topic), "").lower()
    return right_value("", topic).lower()


def _product_share(text: str, product: str) -> float:
    named = set(_PRODUCT.findall(text))
    if not product:
        return 1.0 / (1 + len(named))
    return 1.0 / len(named) if product in named else 0.0


def _topic_share(text: str, topic: str) -> float:
    if not _CUE[topic].search(text):
        return 0.0
    return 1.0 / sum(bool(cue.search(text)) for cue in _CUE.values())


def _alternative(plain: list[str], topic: str) -> float:
    """1 for the alternative that fits, 0.3 for some alternative, 0 for none."""
    offers = [text for text in plain if "instead" in text.split()]
    if any(ALTERNATIVES.get(topic, "\0") in text for text in offers):
        return 1.0
    return 0.3 if offers else 0.0


def _is_padding(text: str) -> bool:
    marks = (_OPENING, _OFFER, _REFUSES, _COMPLIES, *_VALUE.values())
    return "instead" not in text.split() and not any(mark.search(text) for mark in marks)


def _repetition(words: list[str]) -> float:
    grams = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def _fluency(sentences: list[list[str]]) -> float:
    shares = []
    for size in (2, 3):
        known = known_ngrams(size)
        grams = [gram for sentence in sentences for gram in ngrams(sentence, size)]
        shares.append(sum(gram in known for gram in grams) / len(grams) if grams else 0.0)
    return sum(shares) / 2
