"""Several policies as a ranking: the Bradley-Terry model with ties, and how sure it is.

The ties are Davidson's (1970, "On extending the Bradley-Terry model to accommodate ties in paired
comparison experiments"): with strengths p and a tie parameter v,

    P(i beats j) = p_i / Z     P(tie) = v * sqrt(p_i * p_j) / Z     Z = p_i + p_j + v sqrt(p_i p_j)

In log-strengths this is a multinomial logit, so the likelihood has one maximum, which Newton's
method finds. Completions for one prompt are not independent, so the prompt is the unit of
resampling. Pure: numpy, numbers in, numbers out.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

ELO = 400 / np.log(10)  # rating points per unit of log-strength
PRIOR_SD = 4.0
"""Standard deviation of the normal prior on each log-strength and on ln v: so wide that it moves a
result only where a policy wins or loses every comparison, which has no finite maximum."""
LONGEST_STEP = 2.0
BATCH = 200  # resamples that are fitted at once


@dataclass(frozen=True, slots=True)
class Outcome:
    """One comparison: policy ``left`` against policy ``right`` (indices). ``result``: 1 where left
    wins, 0 where right wins, 0.5 for a tie."""

    left: int
    right: int
    result: float
    prompt: Hashable


@dataclass(frozen=True, slots=True)
class Rated:
    """``rating``: 400 points mean odds of ten to one; the mean of all policies is 0. ``ci_low``,
    ``ci_high``: percentile bootstrap over prompts. ``win_rate``: wins and half of the ties, as a
    share of its comparisons."""

    policy: int
    rating: float
    ci_low: float
    ci_high: float
    wins: int
    ties: int
    losses: int

    @property
    def comparisons(self) -> int:
        return self.wins + self.ties + self.losses

    @property
    def win_rate(self) -> float:
        return (self.wins + self.ties / 2) / self.comparisons


def ranking(
    outcomes: Sequence[Outcome],
    policies: int,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Rated]:
    """The best first. Raises ValueError where a policy has no comparison or a result is none."""
    counts = _counts(outcomes, policies)
    total = counts.sum(axis=0)
    if np.any(_played(total) == 0):
        raise ValueError("a policy was compared with no other")
    rating = log_strengths(total[None])[0][0] * ELO
    resampled = _resampled(counts, resamples, seed) * ELO
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail], axis=0)
    found = [
        Rated(
            policy=i,
            rating=float(rating[i]),
            ci_low=float(min(low[i], rating[i])),
            ci_high=float(max(high[i], rating[i])),
            wins=int(total[i, :, 0].sum() + total[:, i, 1].sum()),
            ties=int(total[i, :, 2].sum() + total[:, i, 2].sum()),
            losses=int(total[i, :, 1].sum() + total[:, i, 0].sum()),
        )
        for i in range(policies)
    ]
    return sorted(found, key=lambda one: (-one.rating, one.policy))


def log_strengths(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maximum a posteriori of B tables: ([B, N] log-strengths with mean 0, [B] ln v).

    ``counts`` [B, N, N, 3]: of each ordered pair (i, j) how often i won, j won, neither.
    """
    tables, n = counts.shape[0], counts.shape[1]
    used = [(i, j) for i in range(n) for j in range(n) if counts[:, i, j].any()]
    design = np.zeros((len(used), 3, n + 1))  # of the three outcomes: what their log-odds add up
    for at, (i, j) in enumerate(used):
        design[at, 0, i] = design[at, 1, j] = design[at, 2, n] = 1.0
        design[at, 2, i] = design[at, 2, j] = 0.5
    observed = np.stack([counts[:, i, j] for i, j in used], axis=1).astype(np.float64)
    size = observed.sum(axis=2, keepdims=True)
    theta = np.zeros((tables, n + 1))
    precision = np.eye(n + 1) / PRIOR_SD**2
    for _ in range(200):
        logits = np.einsum("kof,bf->bko", design, theta)
        p = np.exp(logits - logits.max(axis=2, keepdims=True))
        p /= p.sum(axis=2, keepdims=True)
        gradient = np.einsum("bko,kof->bf", observed - size * p, design) - theta @ precision
        mean = np.einsum("bko,kof->bkf", p, design)
        second = np.einsum("bko,kof,kog->bfg", size * p, design, design)
        hessian = second - np.einsum("bkf,bkg->bfg", size * mean, mean) + precision
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        longest = np.abs(step).max(axis=1, keepdims=True)
        theta += step * np.minimum(1.0, LONGEST_STEP / np.maximum(longest, 1e-30))
        if longest.max() < 1e-10:
            break
    else:
        raise RuntimeError("the Bradley-Terry fit did not converge")
    strengths = theta[:, :n]
    return strengths - strengths.mean(axis=1, keepdims=True), theta[:, n]


def _counts(outcomes: Sequence[Outcome], policies: int) -> np.ndarray:
    """[P, N, N, 3]: per prompt, of each ordered pair how often each outcome came."""
    place: dict[Hashable, int] = {}
    for outcome in outcomes:
        place.setdefault(outcome.prompt, len(place))
    counts = np.zeros((len(place), policies, policies, 3))
    kinds = {1.0: 0, 0.0: 1, 0.5: 2}
    for outcome in outcomes:
        if outcome.result not in kinds:
            raise ValueError(f"a result is {outcome.result}, expected 0, 0.5 or 1")
        counts[place[outcome.prompt], outcome.left, outcome.right, kinds[outcome.result]] += 1
    return counts


def _played(total: np.ndarray) -> np.ndarray:
    return np.asarray(total.sum(axis=(1, 2)) + total.sum(axis=(0, 2)))


def _resampled(counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """[resamples, N] log-strengths of tables of as many prompts, drawn with replacement."""
    prompts = len(counts)
    rng = np.random.default_rng(seed)
    flat = counts.reshape(prompts, -1)
    found = []
    for first in range(0, resamples, BATCH):
        weights = rng.multinomial(
            prompts, np.full(prompts, 1 / prompts), size=min(BATCH, resamples - first)
        )
        found.append(log_strengths((weights @ flat).reshape(-1, *counts.shape[1:]))[0])
    return np.concatenate(found)
