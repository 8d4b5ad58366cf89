"""Prompts that stand in a store twice, or in the data that a model is evaluated on. Pure.

Two texts are near duplicates when the Jaccard similarity of their sets of five-character pieces is
high. Candidates are found by MinHash and banding (Broder 1997; Leskovec et al., "Mining of Massive
Datasets", chapter 3), so the time grows with the number of texts, not its square. Each candidate is
then compared exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import xxhash

from cluster.contracts.records import Message
from reward_service.preferences.records import Item

PIECE = 5
BANDS, ROWS = 32, 4  # a pair of similarity 0.8 is missed once in 20 million times
PRIME = (1 << 61) - 1
MOST_PAIRS_PER_BUCKET = 200  # of a bucket of copies each is compared with the first only


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Keys of two texts, and their similarity in [0, 1]; 1: equal but for case, spaces and
    punctuation."""

    first: str
    second: str
    similarity: float


def prompt_text(messages: Sequence[Message]) -> str:
    """What is compared of a prompt: the last message that the model answers."""
    return next((m["content"] for m in reversed(messages) if m["role"] in ("user", "text")), "")


def same_items(items: Iterable[Item]) -> list[tuple[str, ...]]:
    """Ids of items with the same prompt and the same completions, in whatever order."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for item in items:
        prompt = tuple((m["role"], m["content"]) for m in item.messages)
        key = (prompt, tuple(sorted(c.text for c in item.completions)))
        groups.setdefault(key, []).append(item.id)
    return [tuple(ids) for ids in groups.values() if len(ids) > 1]


def near_duplicates(
    texts: Mapping[str, str],
    threshold: float = 0.8,
    against: Mapping[str, str] | None = None,
) -> list[Pair]:
    """Pairs within ``texts`` (key -> text), most alike first; with ``against``, pairs of a text and
    one of these instead."""
    own = {key: _pieces(text) for key, text in texts.items()}
    others = {key: _pieces(text) for key, text in (against or {}).items()}
    sides = [(key, pieces, 0) for key, pieces in own.items()]
    sides += [(key, pieces, 1) for key, pieces in others.items()]
    sides = [side for side in sides if side[1]]
    found = []
    for one, other in _candidates([pieces for _, pieces, _ in sides]):
        (first, a, side_a), (second, b, side_b) = sides[one], sides[other]
        if against is not None and side_a == side_b:
            continue
        similarity = len(a & b) / len(a | b)
        if similarity >= threshold:
            found.append(Pair(first=first, second=second, similarity=similarity))
    return sorted(found, key=lambda pair: (-pair.similarity, pair.first, pair.second))


def _pieces(text: str) -> frozenset[str]:
    plain = " ".join(re.findall(r"\w+", text.lower()))
    if not plain:
        return frozenset()
    return frozenset(plain[n : n + PIECE] for n in range(max(1, len(plain) - PIECE + 1)))


def _candidates(sets: Sequence[frozenset[str]]) -> list[tuple[int, int]]:
    """Pairs of sets, by place, that share a band of their signatures."""
    rng = np.random.default_rng(0)
    factor = rng.integers(1, 1 << 31, BANDS * ROWS, dtype=np.uint64)
    offset = rng.integers(0, 1 << 31, BANDS * ROWS, dtype=np.uint64)
    buckets: dict[tuple[int, bytes], list[int]] = {}
    for number, pieces in enumerate(sets):
        hashes = np.array(
            [xxhash.xxh32_intdigest(piece.encode()) for piece in pieces], dtype=np.uint64
        )
        # 32-bit hash times 31-bit factor stays below 2^64.
        signature = ((hashes[:, None] * factor + offset) % PRIME).min(axis=0)
        for band, part in enumerate(signature.reshape(BANDS, ROWS)):
            buckets.setdefault((band, part.tobytes()), []).append(number)
    pairs: set[tuple[int, int]] = set()
    for members in buckets.values():
        if len(members) > MOST_PAIRS_PER_BUCKET:
            pairs.update((members[0], other) for other in members[1:])
        else:
            pairs.update(combinations(members, 2))
    return sorted(pairs)
