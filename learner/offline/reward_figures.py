"""What the report says of a reward model beside its accuracy: where it is right, and what it likes.

Pure: rows and scores in, one JSON-able dict out.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from learner.evaluation.calibration import confidences, reliability
from learner.evaluation.panels import correlation
from learner.offline.reward_rows import RewardRow
from learner.offline.reward_task import CALIBRATION_BINS, Scores


def held_out_figures(rows: Sequence[RewardRow], scores: Sequence[Scores]) -> dict[str, Any]:
    """reliability (bins), slices, length, ensemble of held-out rows.

    scores: [M, K] of each row's completions by K members, each less its mean on the centring rows.
    """
    means = [own.mean(axis=1) for own in scores]
    pairs = [
        (row, own[better] - own[worse], _tokens(row, better) - _tokens(row, worse))
        for row, own in zip(rows, means, strict=True)
        for better, worse in row.pairs()
    ]
    found: dict[str, Any] = {}
    if pairs:
        gaps = [gap for _, gap, _ in pairs]
        bins = reliability(*confidences(gaps), CALIBRATION_BINS)
        found["reliability"] = [bucket.as_record() for bucket in bins]
        found["length"] = length_bias(rows, means, [(gap, extra) for _, gap, extra in pairs])
    if any(row.slice for row in rows):
        found["slices"] = accuracy_by_slice([(row.slice, gap) for row, gap, _ in pairs])
    if scores and scores[0].shape[1] > 1:
        found["ensemble"] = disagreement(rows, scores)
    return found


def accuracy_by_slice(pairs: Sequence[tuple[str, float]]) -> dict[str, dict[str, float]]:
    """Slice -> pairs and accuracy, the largest slice first."""
    groups: dict[str, list[bool]] = {}
    for name, gap in pairs:
        groups.setdefault(name, []).append(gap > 0)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return {
        name: {"pairs": len(right), "accuracy": statistics.fmean(right)} for name, right in ordered
    }


def length_bias(
    rows: Sequence[RewardRow], scores: Sequence[Scores], pairs: Sequence[tuple[float, int]]
) -> dict[str, float | None]:
    """Does the model take length for quality? Correlation of score and tokens over completions, and
    accuracy where the better completion is shorter, and where it is longer.

    pairs: (score of the better less that of the worse, its tokens less the other's).
    """
    tokens = [float(_tokens(row, i)) for row in rows for i in range(len(row.ranked))]
    flat = [float(score) for own in scores for score in own]
    shorter = [gap > 0 for gap, extra in pairs if extra < 0]
    longer = [gap > 0 for gap, extra in pairs if extra > 0]
    return {
        "correlation": correlation(flat, tokens),
        "accuracy_chosen_shorter": statistics.fmean(shorter) if shorter else None,
        "accuracy_chosen_longer": statistics.fmean(longer) if longer else None,
        "share_chosen_longer": len(longer) / len(pairs) if pairs else None,
    }


def disagreement(rows: Sequence[RewardRow], scores: Sequence[Scores]) -> dict[str, float]:
    """members; disagreement: the mean standard deviation of members' scores of a completion;
    agreement: the share of pairs that two members order alike; accuracy of the single members, on
    average."""
    alike: list[float] = []
    right: list[float] = []
    for row, own in zip(rows, scores, strict=True):
        for better, worse in row.pairs():
            signs = own[better] > own[worse]
            right.append(float(signs.mean()))
            couples = list(itertools.combinations(signs, 2))
            alike.append(statistics.fmean(a == b for a, b in couples))
    return {
        "members": scores[0].shape[1],
        "disagreement": float(np.concatenate(scores).std(axis=1).mean()),
        **({"agreement": statistics.fmean(alike)} if alike else {}),
        **({"mean_member_accuracy": statistics.fmean(right)} if right else {}),
    }


def drift(training: Scores, samples: Scores) -> Mapping[str, float]:
    """How the policy's own completions differ from the training rows, to the model's eyes.

    training, samples: [N, K] scores as in `held_out_figures`. shift: difference of the means, in
    standard deviations of the training scores. spread: ratio of the standard deviations.
    disagreement_ratio: of ensembles, disagreement on samples over that on training rows; far above
    1, the policy writes what the model has not learnt to judge.
    """
    before, after = training.mean(axis=1), samples.mean(axis=1)
    scale = float(before.std())
    found = {
        "samples": float(len(after)),
        "shift": float(after.mean() - before.mean()) / scale,
        "spread": float(after.std()) / scale,
    }
    if training.shape[1] > 1:
        usual = float(training.std(axis=1).mean())
        found["disagreement_ratio"] = float(samples.std(axis=1).mean()) / usual
    return found


def _tokens(row: RewardRow, place: int) -> int:
    return row.ranked[place].trained
