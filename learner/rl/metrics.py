"""The numbers of a step's experience, under their canonical names."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from cluster.contracts.config.safety import refuses
from cluster.contracts.metrics import Metric, largest, last, mean, smallest
from learner.algorithms.importance import effective_sample_size
from learner.algorithms.value_loss import explained_variance
from learner.rl.experience import Experience, Proximal
from learner.rl.rollouts import Array, Ragged, RolloutBatch


def experience_metrics(
    experience: Experience, proximal: Proximal, kl_coef: float, kl_in_reward: bool
) -> list[Metric]:
    """objective/*, value/*, rewards/*, completions/*, async/*, sampling/* of one step.

    proximal: as the update returns it. Every rank that shares the step has to ask, and finds the
    numbers of the whole step.
    """
    own = [
        *_objective(experience, proximal, kl_coef, kl_in_reward),
        *_values(experience),
        *_staleness(experience, proximal),
        *_sampling(experience, proximal),
    ]
    found = {metric.name: metric for metric in experience.ranks.gather_metrics(own)}
    hidden = {name: found.pop(name).value for name in list(found) if name.startswith("_")}
    return [
        *found.values(),
        *_explained(hidden),
        last("async/ess", effective_sample_size(hidden["_is_weight"], hidden["_is_weight_sq"])),
        *_rewards(experience.batch),
        *_completions(experience.batch),
    ]


def sequence_kl(experience: Experience, proximal: Proximal) -> float | None:
    """Mean over the answers of a step of the KL to the reference summed over tokens, nats; None
    without one. Every rank that shares the step has to ask."""
    if proximal.kl is None:
        return None
    total = experience.ranks.total(_total(proximal.kl), proximal.kl.device)
    return total / len(experience)


def _objective(
    experience: Experience, proximal: Proximal, kl_coef: float, kl_in_reward: bool
) -> list[Metric]:
    answers, tokens = len(experience.scores), float(experience.mask.sum())
    scores = float(experience.scores.sum())
    # Sums and counts, not means: metrics of several steps or ranks merge by adding both.
    penalty = 0.0
    found = [
        mean("objective/scores", scores, answers),
        mean("objective/entropy", _total(proximal.entropy), tokens),
    ]
    if proximal.kl is not None:
        kl = _total(proximal.kl)
        penalty = -kl_coef * kl if kl_in_reward else 0.0
        found += [
            mean("objective/kl", kl, answers),
            mean("objective/kl_per_token", kl, tokens),
            last("objective/kl_coef", kl_coef),
        ]
    # What was placed differs from the score by penalties for a missing end, and is part of what
    # is maximised, so both count as rewards that are no score.
    placed = float(experience.terminal.sum())
    return [
        *found,
        mean("objective/non_score_reward", penalty + placed - scores, answers),
        mean("objective/rlhf_reward", penalty + placed, answers),
    ]


def _values(experience: Experience) -> list[Metric]:
    if experience.values is None or experience.returns is None:
        return []
    mask = experience.mask
    # Float64: the variance is a difference of two large numbers.
    values, returns = experience.values[mask].double(), experience.returns[mask].double()
    error = returns - values
    moments = {
        "value/mean": values,
        "_returns": returns,
        "_returns_sq": returns.square(),
        "_error": error,
        "_error_sq": error.square(),
    }
    count = float(mask.sum())
    return [mean(name, float(numbers.sum()), count) for name, numbers in moments.items()]


def _explained(hidden: Mapping[str, float]) -> list[Metric]:
    if "_returns" not in hidden:
        return []
    names = ("_returns", "_returns_sq", "_error", "_error_sq")
    explained = explained_variance(*(hidden[name] for name in names))
    # Undefined where all returns are equal; a NaN in a log says nothing.
    return [] if np.isnan(explained) else [last("value/explained_var", explained)]


def _rewards(batch: RolloutBatch) -> list[Metric]:
    scores = batch.scores
    _, group = np.unique(batch.group_ids, return_inverse=True)
    # Without a sort or a loop over groups: smallest and largest score of each, at once.
    low = np.full(group.max() + 1, np.inf)
    high = -low
    np.minimum.at(low, group, scores)
    np.maximum.at(high, group, scores)
    found = [
        *_mean_std("rewards", scores),
        smallest("rewards/min", float(scores.min())),
        largest("rewards/max", float(scores.max())),
        # Groups with equal scores give group methods nothing to learn from.
        mean("rewards/zero_std_frac", float((low == high).sum()), len(low)),
    ]
    for name, part in batch.parts.items():
        # A part is missing (NaN) where a source of this name did not score the row.
        found += _mean_std(f"rewards/{name}", part[np.isfinite(part)])
    return found


def _mean_std(name: str, numbers: Array) -> list[Metric]:
    if len(numbers) == 0:
        return []
    std = float(numbers.std(ddof=1)) if len(numbers) > 1 else 0.0
    return [mean(f"{name}/mean", float(numbers.sum()), len(numbers)), last(f"{name}/std", std)]


def _completions(batch: RolloutBatch) -> list[Metric]:
    lengths, cut = batch.response_ids.lengths, float(batch.truncated.sum())
    repeated, sequences = repeated_sequences(batch.response_ids)
    refusals = sum(map(refuses, batch.table.column("text").to_pylist()))
    return [
        mean("completions/mean_length", float(lengths.sum()), len(batch)),
        largest("completions/max_length", float(lengths.max())),
        mean("completions/clipped_ratio", cut, len(batch)),
        mean("completions/eos_rate", len(batch) - cut, len(batch)),
        mean("completions/refusal_rate", refusals, len(batch)),
        # Of completions shorter than four tokens there is nothing to say.
        *([mean("completions/repeated_frac", repeated, sequences)] if sequences else []),
    ]


def repeated_sequences(ids: Ragged, size: int = 4) -> tuple[int, int]:
    """How many sequences of `size` tokens have occurred before in their row, and how many there
    are."""
    starts = len(ids.values) - size + 1
    if starts < 1:
        return 0, 0
    row = np.repeat(np.arange(len(ids.lengths)), ids.lengths)
    within = row[:starts] == row[size - 1 :]
    # Hashes instead of the tokens: one number per sequence sorts quickly, and 64 bits do not meet.
    values, mixed = ids.values.astype(np.uint64), np.zeros(starts, np.uint64)
    for place in range(size):
        mixed = (mixed ^ values[place : place + starts]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    mixed, row = mixed[within], row[:starts][within]
    order = np.lexsort((mixed, row))
    same = (mixed[order][1:] == mixed[order][:-1]) & (row[order][1:] == row[order][:-1])
    return int(same.sum()), len(mixed)


def _staleness(experience: Experience, proximal: Proximal) -> list[Metric]:
    parts = {key: (float(s), float(n)) for key, (s, n) in proximal.importance_parts.items()}
    tokens = float(experience.mask.sum())
    return [
        mean("async/staleness_mean", float(experience.age.sum()), tokens),
        largest("async/staleness_max", float(experience.age.max())),
        mean("_is_weight", *parts["is_weight"]),
        mean("_is_weight_sq", *parts["is_weight_sq"]),
        mean("sampling/is_ratio_mean", *parts["is_ratio"]),
        mean("sampling/is_clipped_frac", *parts["is_clipped_frac"]),
        mean("sampling/veto_frac", *parts["veto"]),
    ]


def _sampling(experience: Experience, proximal: Proximal) -> list[Metric]:
    """Engine against learner. Only tokens of the learner's own version show a fault: older ones
    differ by right."""
    mask = experience.mask
    difference = (proximal.logp - experience.behaviour_logp).where(mask, 0.0).double()
    found = [mean("sampling/logp_diff_all_mean", float(difference.abs().sum()), float(mask.sum()))]
    current = mask & (experience.age == 0)
    # The engine may be a version behind by design: its own error shows at equal weights only.
    count = float(current.sum())
    if count == 0:
        return found
    fresh = difference[current]
    return [
        *found,
        mean("sampling/logp_diff_mean", float(fresh.abs().sum()), count),
        largest("sampling/logp_diff_max", float(fresh.abs().max())),
        mean("sampling/mismatch_kl", float(-fresh.sum()), count),
    ]


def _total(tensor: Tensor) -> float:
    return float(tensor.sum(dtype=torch.float64))
