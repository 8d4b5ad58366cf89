"""How unlike texts are, and choices of texts that are unlike each other. Pure.

A text is a vector of hashed words and pairs of neighbouring words. Each counts log(N / n), for n of
the N texts that hold it. The similarity of two texts is the cosine of their vectors, from 0 to 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import xxhash
from numpy.typing import NDArray

DIMENSIONS = 1024
ALMOST_THE_SAME = 0.95

Features = NDArray[np.float32]


def text_features(texts: Sequence[str]) -> Features:
    """[N, DIMENSIONS], rows of length 1; of 0 for a text that holds only what all texts hold."""
    found = np.zeros((len(texts), DIMENSIONS), dtype=np.float32)
    for row, text in zip(found, texts, strict=True):
        row[_places(text)] = 1.0
    holding = np.maximum(found.sum(axis=0), 1.0)
    found *= np.log((1 + len(texts)) / holding, dtype=np.float32)
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    return np.divide(found, lengths, out=np.zeros_like(found), where=lengths > 0)


def _places(text: str) -> list[int]:
    words = re.findall(r"\w+", text.lower())
    pairs = [f"{a} {b}" for a, b in pairwise(words)]
    return [xxhash.xxh32_intdigest(part.encode()) % DIMENSIONS for part in {*words, *pairs}]


def almost_the_same_last(features: Features, most: int) -> list[int]:
    """Rows in their order, but one that is almost the same as one before only after all others;
    the first ``most``."""
    chosen: list[int] = []
    later: list[int] = []
    for number, row in enumerate(features):
        if len(chosen) == most:
            break
        near = bool(chosen) and float((features[chosen] @ row).max()) > ALMOST_THE_SAME
        (later if near else chosen).append(number)
    return [*chosen, *later][:most]


def farthest_first(
    features: Features, groups: Sequence[int], each: int, most: int
) -> list[tuple[int, float | None]]:
    """(row, its distance to the nearest row chosen before), always the one that is farthest; the
    first ``most``, at most ``each`` of a group. The first row comes first, without a distance."""
    of_group = np.array(groups, dtype=np.int64)
    distance = np.full(len(features), 2.0)
    left = np.ones(len(features), dtype=bool)
    taken: dict[int, int] = {}
    chosen: list[tuple[int, float | None]] = []
    while len(chosen) < most and left.any():
        best = int(np.where(left, distance, -1.0).argmax())
        chosen.append((best, float(distance[best]) if chosen else None))
        distance = np.minimum(distance, np.maximum(0.0, 1 - features @ features[best]))
        left[best] = False
        group = groups[best]
        taken[group] = taken.get(group, 0) + 1
        if taken[group] == each:
            left[of_group == group] = False
    return chosen
