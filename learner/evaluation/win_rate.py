"""How often one policy's answers beat another's, with an interval that respects the prompts.

Answers to the same prompt are not independent, so the prompt is the unit of resampling. Ties count
half. Pure: numpy and scipy, numbers in, numbers out.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats


@dataclass(frozen=True, slots=True)
class WinRate:
    """``rate`` = (wins + ties / 2) / pairs; the interval is two-sided at ``confidence``.

    ``method``: "wilson" (each prompt once, no ties), "bootstrap" (BCa over prompts) or
    "wilson-bound" (every prompt has the same result, so that a bootstrap would claim certainty).
    """

    wins: int
    ties: int
    losses: int
    rate: float
    ci_low: float
    ci_high: float
    confidence: float
    prompts: int
    method: str

    @property
    def pairs(self) -> int:
        return self.wins + self.ties + self.losses

    def as_record(self) -> dict[str, float | int | str]:
        """The part of ``evaluation.json`` that this module knows."""
        return {
            "win_rate": self.rate,
            "ci_low": self.ci_low,
            "ci_high": self.ci_high,
            "wins": self.wins,
            "ties": self.ties,
            "losses": self.losses,
            "pairs": self.pairs,
            "prompts": self.prompts,
            "confidence": self.confidence,
            "interval": self.method,
        }


@dataclass(frozen=True, slots=True)
class LengthControlled:
    """Win rate at equal length, and the log-odds that one standard deviation of length buys."""

    rate: float
    length_effect: float


def outcomes(pairs: Sequence[tuple[float, float]], tie_margin: float = 0.0) -> np.ndarray:
    """[N] float64 out of N (policy score, baseline score): 1 a win, 0.5 a tie, 0 a loss.

    A tie is a difference of at most ``tie_margin``. Raises ValueError naming the first pair whose
    score is not finite.
    """
    scores = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
    bad = np.flatnonzero(~np.isfinite(scores).all(axis=1))
    if bad.size:
        raise ValueError(f"pair {bad[0]} has a score that is not finite: {scores[bad[0]].tolist()}")
    if tie_margin < 0:
        raise ValueError(f"tie_margin is {tie_margin}; it cannot be negative")
    difference = scores[:, 0] - scores[:, 1]
    return np.where(np.abs(difference) <= tie_margin, 0.5, (difference > 0).astype(np.float64))


def win_rate(
    pairs: Sequence[tuple[float, float]],
    prompts: Sequence[Hashable] | None = None,
    *,
    tie_margin: float = 0.0,
    confidence: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> WinRate:
    """Win rate of N (policy score, baseline score) pairs.

    ``prompts[i]`` says which prompt pair i answers (None: each its own). Without ties and with one
    pair a prompt, the interval is Wilson's (1927); otherwise BCa (Efron 1987) over prompts, seeded.
    Raises ValueError when there are no pairs or the lengths differ.
    """
    result = outcomes(pairs, tie_margin)
    if result.size == 0:
        raise ValueError("there are no pairs to compare")
    sums, counts = _by_prompt(result, prompts)
    wins, ties = int((result == 1).sum()), int((result == 0.5).sum())
    rate = float(result.mean())
    shares = sums / counts
    if ties == 0 and counts.max() == 1:
        method = "wilson"
        found = stats.binomtest(wins, result.size).proportion_ci(confidence, method="wilson")
        low, high = float(found.low), float(found.high)
    elif np.ptp(shares) == 0:
        method = "wilson-bound"
        low, high = _wilson(rate, len(sums), confidence)
    else:
        method = "bootstrap"
        low, high = _bootstrap(sums, counts, confidence, resamples, seed)
    losses = result.size - wins - ties
    return WinRate(wins, ties, losses, rate, low, high, confidence, len(sums), method)


def _by_prompt(
    result: np.ndarray, prompts: Sequence[Hashable] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Per prompt [P]: sum of outcomes and number of pairs, both float64."""
    if prompts is None:
        return result, np.ones_like(result)
    if len(prompts) != result.size:
        raise ValueError(f"{result.size} pairs but {len(prompts)} prompts")
    index: dict[Hashable, int] = {}
    where = np.array([index.setdefault(key, len(index)) for key in prompts])
    sums = np.bincount(where, weights=result).astype(np.float64)
    return sums, np.bincount(where).astype(np.float64)


def _bootstrap(
    sums: np.ndarray, counts: np.ndarray, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """BCa interval of sum(sums) / sum(counts), over prompts; percentile where BCa has none."""

    def ratio(top: np.ndarray, bottom: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(top.sum(axis=axis) / bottom.sum(axis=axis))

    for method in ("BCa", "percentile"):
        found = stats.bootstrap(
            (sums, counts),
            ratio,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=max(1, 2_000_000 // len(sums)),  # BCa's jackknife is P x P without a limit
            confidence_level=confidence,
            method=method,
            rng=np.random.default_rng(seed),
        ).confidence_interval
        if np.isfinite(found.low) and np.isfinite(found.high):
            break
    return float(found.low), float(found.high)


def _wilson(rate: float, n: int, confidence: float) -> tuple[float, float]:
    """Wilson's interval for a mean of values in [0, 1].

    Of all such variables with this mean the 0/1 one varies most, so the interval is not too narrow.
    """
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def length_controlled(
    result: Sequence[float] | np.ndarray, length_difference: Sequence[float] | np.ndarray
) -> LengthControlled | None:
    """What the win rate would be if both answers were equally long.

    Logistic regression of the outcome [N] on d = tanh(difference / its standard deviation), where
    the difference [N] is policy length minus baseline length, in any unit; the rate is the logistic
    of the intercept. After Dubois et al. 2024, "Length-Controlled AlpacaEval", without their term
    for the difficulty of each prompt. A standard normal prior on the slope keeps it finite where
    length alone explains every result. None when all differences are one same number other than 0:
    length and quality cannot then be told apart.
    """
    y = np.asarray(result, dtype=np.float64)
    difference = np.asarray(length_difference, dtype=np.float64)
    if y.shape != difference.shape or y.ndim != 1 or y.size == 0:
        raise ValueError(f"{y.shape} outcomes and {difference.shape} length differences")
    spread = float(difference.std())
    if spread == 0:
        same = bool(difference[0] == 0)
        return LengthControlled(float(y.mean()), 0.0) if same else None
    x = np.tanh(difference / spread)

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        logit = theta[0] + theta[1] * x
        value = float(np.sum(np.logaddexp(0, logit) - y * logit) + theta[1] ** 2 / 2)
        error = special.expit(logit) - y
        return value, np.array([error.sum(), (error * x).sum() + theta[1]])

    # An intercept of 30 is a rate of 1 to 13 digits: where every pair is a win there is no optimum.
    found = optimize.minimize(
        loss, np.zeros(2), jac=True, method="L-BFGS-B", bounds=[(-30, 30), (None, None)]
    )
    if not found.success:
        raise RuntimeError(f"the length regression did not converge: {found.message}")
    return LengthControlled(float(special.expit(found.x[0])), float(found.x[1]))
