"""The score of best-of-n for every n, from one pool of completions per prompt.

Source: Gao, Schulman, Hilton 2022, "Scaling laws for reward model overoptimization", appendix I.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def best_of_n_scores(
    choosing: NDArray[Any], judged: NDArray[Any], sizes: Sequence[int]
) -> NDArray[np.float64]:
    """[P, len(sizes)]: per prompt, the expected ``judged`` score of the completion that has the
    highest ``choosing`` score among n completions drawn from the prompt's pool.

    choosing, judged: [P, N], the two scores of the N completions in the pool of each prompt.
    sizes: every n, from 1 to N. The mean over all subsets of size n is computed exactly, so the
    estimate has no bias: sorted by ``choosing``, the i-th lowest completion is the best of
    C(i-1, n-1) of the C(N, n) subsets. Completions with equal ``choosing`` scores are as likely to
    be chosen as each other. Raises ValueError for shapes or sizes that cannot be.
    """
    if choosing.ndim != 2 or choosing.shape != judged.shape:
        raise ValueError(f"scores of shapes {choosing.shape} and {judged.shape}, not both [P, N]")
    pool = choosing.shape[1]
    if not sizes or not 1 <= min(sizes) <= max(sizes) <= pool:
        raise ValueError(f"sizes {list(sizes)} are not all from 1 to the {pool} of the pool")
    ordered = np.stack([_in_order(c, j) for c, j in zip(choosing, judged, strict=True)])
    return ordered @ np.stack([_chances(pool, size) for size in sizes], axis=1)


def _in_order(choosing: NDArray[Any], judged: NDArray[Any]) -> NDArray[np.float64]:
    """The judged scores, lowest choosing score first; of equals each has the mean."""
    values, place, count = np.unique(choosing, return_inverse=True, return_counts=True)
    means = np.bincount(place, weights=judged, minlength=len(values)) / count
    return np.repeat(means, count)


def _chances(pool: int, size: int) -> NDArray[np.float64]:
    """[N]: how likely the i-th lowest of the pool is the best of a subset of this size.

    C(i-1, n-1) / C(N, n) from the top down: the highest has n / N, and each next one the share
    (i - n) / (i - 1) of that above it.
    """
    rank = np.arange(pool, 1, -1)  # i of the one above
    shares = np.maximum(rank - size, 0) / (rank - 1)
    return (size / pool * np.concatenate([[1.0], np.cumprod(shares)]))[::-1]
