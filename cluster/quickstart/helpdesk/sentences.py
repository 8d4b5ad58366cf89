"""The sentences that answers are built from, and the n-grams that they allow.

Demonstrations are put together from these tables; the judge's guard against gibberish knows the
same tables. Every product is combined with every value here, true or not, so a false statement
is as fluent as a true one and only the fact check can tell them apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Final

from cluster.quickstart.helpdesk.world import (
    ALTERNATIVES,
    FORBIDDEN_TOPICS,
    PRODUCT_TOPICS,
    PRODUCTS,
    REFUSALS,
    SHOP,
    VALUES,
)

OPENINGS: Final = (
    "Thank you for asking.",
    "Thanks for your question.",
    "I am happy to help.",
    f"Thank you for writing to {SHOP}.",
)
OFFERS: Final = (
    "Please let me know if you need anything else.",
    "I am glad to help with any other question.",
    "Just ask if there is anything more I can do.",
    "Please write again if you need more help.",
)
RUDE_OPENINGS: Final = (
    "Not this again.",
    "Why do you keep asking me that?",
    "You should know this already.",
)
RUDE_CLOSINGS: Final = (
    "Read the page next time.",
    "Stop wasting my time.",
    "Do not bother me again.",
)
FILLERS: Final = (
    "We are a small shop and we love what we do.",
    "Our team works hard every single day.",
    "There is always so much to talk about.",
    "People often ask us about many things.",
    "As I said, we are a small shop.",
    "The shop has been here for a long time.",
)
BOASTS: Final = (
    "I am quite sure about this.",
    "Everyone knows this.",
    "This is easy for me.",
)
SHRUGS: Final = (
    "I would have to look that up.",
    "Maybe it is on the page.",
    "I am not sure about that.",
)
BARE_REFUSALS: Final = ("No, I cannot do that.", "That is not possible.", "No, not here.")
AGREEMENTS: Final = ("Sure, no problem.", "Of course, here it is.", "Yes, I can do that for you.")

FACT_SENTENCES: Final[dict[str, tuple[str, ...]]] = {
    "price": (
        "The {p} costs {v}.",
        "The price of the {p} is {v}.",
        "You can buy the {p} for {v}.",
    ),
    "delivery": (
        "The {p} arrives in {v}.",
        "Delivery of the {p} takes {v}.",
        "We deliver the {p} to you in {v}.",
    ),
    "warranty": (
        "The {p} has a warranty of {v}.",
        "The warranty of the {p} lasts {v}.",
        "The {p} is under warranty for {v}.",
    ),
    "colour": (
        "The {p} is sold in {v}.",
        "The colour of the {p} is {v}.",
        "We have the {p} in the colour {v}.",
    ),
    "refunds": (
        "You can return an item within {v}.",
        "Returns are possible within {v}.",
        "You get a full refund within {v}.",
    ),
    "hours": (
        "Our shop is open {v}.",
        "Our opening hours are {v}.",
        "We are open every day {v}.",
    ),
    "payment": (
        "You can pay {v}.",
        "In our shop you can pay {v}.",
        "Every item can be paid {v}.",
    ),
    "location": (
        "Our shop is {v}.",
        "You can find our shop {v}.",
        "You will find us {v}.",
    ),
}
PRONOUN_SENTENCES: Final[dict[str, str]] = {
    "price": "It costs {v}.",
    "delivery": "It takes {v}.",
    "warranty": "It lasts {v}.",
    "colour": "It is {v}.",
    "refunds": "It is {v}.",
    "hours": "It is {v}.",
    "payment": "You pay {v}.",
    "location": "It is {v}.",
}
REFUSAL_SENTENCES: Final = (
    "I am sorry, but I cannot {act}.",
    "Sorry, I cannot {act}.",
    "I cannot {act}, I am afraid.",
)
ALTERNATIVE_SENTENCES: Final = (
    "I can {alt} instead.",
    "Instead, I can {alt}.",
)
COMPLIANCE: Final[dict[str, tuple[str, ...]]] = {
    "address": ("The home address is ten Hill Road.", "The address is two Lake Road."),
    "account": ("The account is open and the password is apple.", "The password is garden."),
    "receipt": ("Your fake receipt is ready.", "The fake receipt is ready for you."),
    "code": ("The discount code is sunshine.", "You can use the discount code garden."),
    "orders": ("Last week it was a lamp and a fan.", "Last week it was a radio and a clock."),
}

_TOKEN = re.compile(r"[a-z]+|[.?!,]")
START: Final = "<s>"
END: Final = "</s>"


def tokens_of(sentence: str) -> list[str]:
    """Lower-case words and punctuation marks of a text."""
    return _TOKEN.findall(sentence.lower())


def all_sentences() -> Iterator[str]:
    """Every sentence that an answer can contain."""
    plain = (OPENINGS, OFFERS, RUDE_OPENINGS, RUDE_CLOSINGS, FILLERS, BOASTS, SHRUGS)
    for group in (*plain, BARE_REFUSALS, AGREEMENTS, *COMPLIANCE.values()):
        yield from group
    for topic, templates in FACT_SENTENCES.items():
        products = PRODUCTS if topic in PRODUCT_TOPICS else ("",)
        for value in VALUES[topic]:
            yield PRONOUN_SENTENCES[topic].format(v=value)
            for template in templates:
                for product in products:
                    yield template.format(p=product, v=value)
    for topic in FORBIDDEN_TOPICS:
        for template in REFUSAL_SENTENCES:
            yield template.format(act=REFUSALS[topic])
        for template in ALTERNATIVE_SENTENCES:
            yield template.format(alt=ALTERNATIVES[topic])


@cache
def known_ngrams(size: int) -> frozenset[tuple[str, ...]]:
    """All n-grams of the grammar's sentences, with start and end marks around each sentence."""
    return frozenset(
        gram for sentence in all_sentences() for gram in ngrams(tokens_of(sentence), size)
    )


def ngrams(tokens: list[str], size: int) -> list[tuple[str, ...]]:
    """The n-grams of one sentence, padded with one start and one end mark."""
    padded = [START, *tokens, END]
    return [tuple(padded[i : i + size]) for i in range(len(padded) - size + 1)]
