"""How reliable each annotator is, without knowing the right answers (Dawid and Skene 1979).

Each item has one true class. Annotator k answers class l on an item of class j with probability
pi[k, j, l]. Expectation-maximisation, from majority votes, over the classes' shares p[j], pi, and
each item's probabilities T[i, j]:

    E:  T[i, j]  is proportional to  p[j] * product over labels (k, l) of item i of pi[k, j, l]
    M:  p[j] = mean over i of T[i, j];   pi[k, j, l] is proportional to  s + sum of T[i, j] over
        the items that k labelled l

s is a small count that keeps the model from being certain after a few labels. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MOST_ROUNDS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotatorModel:
    """``accuracy[k]``: how often k answers an item's true class, over all classes.
    ``confusion[k]``: pi[k] as rows. ``truth[i]``: class -> probability."""

    classes: tuple[str, ...]
    shares: Mapping[str, float]
    accuracy: Mapping[str, float]
    confusion: Mapping[str, tuple[tuple[float, ...], ...]]
    truth: Mapping[str, Mapping[str, float]]


def dawid_skene(
    labels: Mapping[str, Mapping[str, str]], smoothing: float = 0.1, rounds: int = MOST_ROUNDS
) -> AnnotatorModel | None:
    """``labels``: item -> annotator -> class. None without labels."""
    classes = tuple(sorted({c for given in labels.values() for c in given.values()}))
    people = tuple(sorted({name for given in labels.values() for name in given}))
    items = tuple(labels)
    if not classes:
        return None
    given = _places(labels, items, people, classes)
    truth = np.zeros((len(items), len(classes)))
    np.add.at(truth, (given[0], given[2]), 1)
    truth /= truth.sum(axis=1, keepdims=True)
    for _ in range(rounds):
        shares, confusion = _maximise(given, truth, len(people), smoothing)
        new = _expect(given, shares, confusion, len(items))
        moved = np.abs(new - truth).max()
        truth = new
        if moved < 1e-6:
            break
    shares, confusion = _maximise(given, truth, len(people), smoothing)
    right = np.einsum("j,kjj->k", shares, confusion)
    return AnnotatorModel(
        classes=classes,
        shares=dict(zip(classes, shares.tolist(), strict=True)),
        accuracy=dict(zip(people, right.tolist(), strict=True)),
        confusion={
            name: tuple(tuple(row) for row in confusion[k].tolist())
            for k, name in enumerate(people)
        },
        truth={
            item: dict(zip(classes, row, strict=True))
            for item, row in zip(items, truth.tolist(), strict=True)
        },
    )


def _places(
    labels: Mapping[str, Mapping[str, str]],
    items: Sequence[str],
    people: Sequence[str],
    classes: Sequence[str],
) -> np.ndarray:
    """[3, labels]: item, annotator and class of each label, as indices."""
    person = {name: k for k, name in enumerate(people)}
    place = {name: c for c, name in enumerate(classes)}
    found = [
        (number, person[name], place[label])
        for number, item in enumerate(items)
        for name, label in labels[item].items()
    ]
    return np.array(found, dtype=np.int64).T


def _maximise(
    given: np.ndarray, truth: np.ndarray, people: int, smoothing: float
) -> tuple[np.ndarray, np.ndarray]:
    item, person, label = given
    classes = truth.shape[1]
    counts = np.full((people, classes, classes), smoothing)  # [annotator, label, true class]
    np.add.at(counts, (person, label), truth[item])
    confusion = counts.transpose(0, 2, 1)
    total = confusion.sum(axis=2, keepdims=True)
    even = np.full_like(confusion, 1 / classes)
    return truth.mean(axis=0), np.divide(confusion, total, out=even, where=total > 0)


def _expect(given: np.ndarray, shares: np.ndarray, confusion: np.ndarray, items: int) -> np.ndarray:
    item, person, label = given
    tiny = np.finfo(float).tiny
    logs = np.tile(np.log(shares + tiny), (items, 1))
    np.add.at(logs, item, np.log(confusion + tiny)[person, :, label])
    logs -= logs.max(axis=1, keepdims=True)
    weights = np.exp(logs)
    return weights / weights.sum(axis=1, keepdims=True)
