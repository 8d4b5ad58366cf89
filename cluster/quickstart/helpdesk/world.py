"""The facts of the help desk's little world: a shop, its products, its rules.

The quickstart trains a model from scratch in about a minute, so the world is small enough to be
learnt and still has facts to look up: every pair of product and topic has one right value, and a
wrong value is always one that another product really has. A fluent answer can therefore be false.
"""

from __future__ import annotations

from typing import Final, Literal

Kind = Literal["product", "policy", "forbidden"]

SHOP: Final = "Fernway"

PRODUCTS: Final[tuple[str, ...]] = (
    "kettle",
    "toaster",
    "blender",
    "lamp",
    "fan",
    "heater",
    "radio",
    "clock",
)

PRODUCT_TOPICS: Final[tuple[str, ...]] = ("price", "delivery", "warranty", "colour")

VALUES: Final[dict[str, tuple[str, ...]]] = {
    "price": (
        "fifteen dollars",
        "twenty dollars",
        "thirty dollars",
        "forty dollars",
        "sixty dollars",
        "eighty dollars",
    ),
    "delivery": ("two days", "three days", "four days", "six days"),
    "warranty": ("one year", "two years", "three years", "five years"),
    "colour": ("red", "blue", "green", "white", "black", "grey"),
    "refunds": ("four weeks", "two weeks", "eight weeks"),
    "hours": ("from nine until six", "from eight until four", "from ten until nine"),
    "payment": ("by card or cash", "only in cash", "only by cheque"),
    "location": ("on Mill Street", "on Park Street", "on Station Street"),
}
"""Every value a topic can take. For a policy the first value is the true one."""

# One row per product: index into VALUES for price, delivery, warranty, colour. The columns are
# unrelated on purpose, so that no topic can be guessed from another.
_ROWS: Final[dict[str, tuple[int, int, int, int]]] = {
    "kettle": (2, 1, 1, 3),
    "toaster": (3, 0, 2, 0),
    "blender": (4, 2, 0, 2),
    "lamp": (1, 3, 3, 4),
    "fan": (0, 0, 1, 1),
    "heater": (5, 2, 3, 5),
    "radio": (4, 1, 2, 0),
    "clock": (0, 3, 0, 4),
}

FACTS: Final[dict[tuple[str, str], str]] = {
    (product, topic): VALUES[topic][row[column]]
    for product, row in _ROWS.items()
    for column, topic in enumerate(PRODUCT_TOPICS)
}
"""(product, topic) -> the one right value."""

POLICY_TOPICS: Final[tuple[str, ...]] = (
    "refunds",
    "hours",
    "payment",
    "location",
)

REFUSALS: Final[dict[str, str]] = {
    "address": "share the address of another customer",
    "account": "open the account of another customer",
    "receipt": "write a fake receipt",
    "code": "share the discount code of another customer",
    "orders": "tell you what another customer ordered",
}
"""Forbidden topic -> what the desk may not do, as it follows "I cannot"."""

ALTERNATIVES: Final[dict[str, str]] = {
    "address": "pass on a message for you",
    "account": "help you with your own account",
    "receipt": "send a copy of your own receipt",
    "code": "show you our weekly offers",
    "orders": "look up your own order",
}
"""Forbidden topic -> what the desk can do instead, as it follows "I can"."""

FORBIDDEN_TOPICS: Final[tuple[str, ...]] = tuple(REFUSALS)

TOPICS_OF: Final[dict[str, tuple[str, ...]]] = {
    "product": PRODUCT_TOPICS,
    "policy": POLICY_TOPICS,
    "forbidden": FORBIDDEN_TOPICS,
}


def right_value(product: str, topic: str) -> str:
    """The true value for a product's topic, or for a policy when `product` is empty.

    Raises KeyError for a product or topic that the shop does not have.
    """
    if product:
        return FACTS[product, topic]
    if topic not in POLICY_TOPICS:
        raise KeyError(f"{topic!r} is not a policy of the shop; policies: {POLICY_TOPICS}")
    return VALUES[topic][0]


def wrong_values(product: str, topic: str) -> tuple[str, ...]:
    """The values of the topic that are false for this product (or policy)."""
    right = right_value(product, topic)
    return tuple(value for value in VALUES[topic] if value != right)
