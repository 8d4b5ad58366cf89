"""Curves, fits, table and plot of `overoptimisation.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.assembly.best_of_n import kl_bound
from learner.evaluation.best_of_n import best_of_n_scores
from learner.evaluation.frontier import Fit, Method, Point, fit

Array = NDArray[np.float64]
BLOCK = 3
"""Learner steps that make one point of a PPO curve: the mean of their scores and of their KL."""
RESAMPLES = 500
TITLES: Mapping[str, str] = {"best-of-n": "best-of-n", "rl": "PPO, no KL penalty"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Scores less those of the start, against distance = sqrt(KL).

    pairs: those that the proxy learnt from. places: n, or the last learner step of each point.
    distance_draws, gold_draws: [RESAMPLES, points], the same of resampled prompts. agreement: share
    of the pairs of one prompt's completions that the proxy orders as gold does.
    """

    method: Method
    pairs: int
    places: list[int]
    distance: Array
    proxy: Array
    gold: Array
    distance_draws: Array
    gold_draws: Array
    agreement: float | None = None

    def fitted(self) -> Fit:
        return _law(self.distance, self.gold, self.method)

    def errors(self) -> tuple[float, float]:
        """Standard errors of alpha and beta: their spread over the resampled prompts."""
        draws = zip(self.distance_draws, self.gold_draws, strict=True)
        fits = [_law(distance, gold, self.method) for distance, gold in draws]
        alpha, beta = ([getattr(one, name) for one in fits] for name in ("alpha", "beta"))
        return float(np.std(alpha)), float(np.std(beta))


def _law(distance: Array, score: Array, method: Method) -> Fit:
    points = [Point(i, *pair) for i, pair in enumerate(zip(distance, score, strict=True))]
    found = fit(points, method, start=0.0)
    if found is None:
        raise ValueError(f"fewer than four distances: {distance}")
    return found


def best_of_n_curve(pairs: int, proxy: Array, gold: Array) -> Curve:
    """proxy, gold: [prompts, completions of the pool]. n doubles in two steps, up to all."""
    pool = proxy.shape[1]
    sizes = sorted(
        {round(2 ** (half / 2)) for half in range(int(2 * math.log2(pool)) + 1)} | {pool}
    )
    by_prompt = best_of_n_scores(proxy, gold, sizes)
    by_prompt -= by_prompt[:, :1].mean()
    chosen = best_of_n_scores(proxy, proxy, sizes).mean(axis=0)
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(gold), size=(RESAMPLES, len(gold)))
    draws = by_prompt[drawn].mean(axis=1)
    distance = np.sqrt([kl_bound(size) for size in sizes])
    return Curve(
        method="best-of-n",
        pairs=pairs,
        places=sizes,
        distance=distance,
        distance_draws=np.tile(distance, (RESAMPLES, 1)),
        proxy=chosen - chosen[0],
        gold=by_prompt.mean(axis=0),
        gold_draws=draws - draws[:, :1],
        agreement=_agreement(proxy, gold),
    )


def _agreement(proxy: Array, gold: Array) -> float:
    """Over neighbours in the pool, which were drawn independently; equal scores are left out."""
    differences = [(scores[:, 1::2] - scores[:, ::2]).ravel() for scores in (proxy, gold)]
    product = np.sign(differences[0]) * np.sign(differences[1])
    return float((product > 0).sum() / (product != 0).sum())


def ppo_curve(pairs: int, scores: Mapping[str, Array], centre: tuple[float, float]) -> Curve:
    """scores: step, group, proxy, gold and kl of each completion. centre: proxy and gold of the
    start."""
    steps = np.unique(scores["step"])
    blocks = [steps[first : first + BLOCK] for first in range(0, len(steps), BLOCK)]
    rng = np.random.default_rng(0)
    kls, golds, proxies, draws = [], [], [], []
    for block in blocks:
        rows = np.isin(scores["step"], block)
        kl, gold = scores["kl"][rows], scores["gold"][rows]
        kls.append(kl.mean())
        golds.append(gold.mean())
        proxies.append(scores["proxy"][rows].mean())
        draws.append(_resampled(scores["group"][rows], np.stack([kl, gold]), rng))
    return Curve(
        method="rl",
        pairs=pairs,
        places=[int(block[-1]) for block in blocks],
        distance=_roots(np.array(kls)),
        distance_draws=_roots(np.stack([draw[0] for draw in draws], axis=1)),
        proxy=np.array(proxies) - centre[0],
        gold=np.array(golds) - centre[1],
        gold_draws=np.stack([draw[1] for draw in draws], axis=1) - centre[1],
    )


def _roots(kl: Array) -> Array:
    """A sampled KL can come out below 0 near the start."""
    return np.sqrt(np.maximum(kl, 0.0))


def _resampled(group: Array, values: Array, rng: np.random.Generator) -> Array:
    """[K, RESAMPLES] means of K values per completion [K, N], over groups (one prompt each) drawn
    with replacement."""
    _, place, count = np.unique(group, return_inverse=True, return_counts=True)
    means = np.stack([np.bincount(place, weights=row) / count for row in values])
    found: Array = means[:, rng.integers(len(count), size=(RESAMPLES, len(count)))].mean(axis=2)
    return found


def results_of(curves: Sequence[Curve]) -> dict[str, Any]:
    return {"curves": [_record(curve) for curve in curves]}


def _record(curve: Curve) -> dict[str, Any]:
    law, errors = curve.fitted(), curve.errors()
    place = "n" if curve.method == "best-of-n" else "step"
    return {
        "method": curve.method,
        "pairs": curve.pairs,
        "agreement": None if curve.agreement is None else round(curve.agreement, 4),
        "alpha": round(law.alpha, 4),
        "alpha_error": round(errors[0], 4),
        "beta": round(law.beta, 4),
        "beta_error": round(errors[1], 4),
        "r_squared": round(law.r_squared, 4),
        "peak_distance": law.peak,
        place: curve.places,
        **{
            name: [round(float(value), 4) for value in values]
            for name, values in (
                ("distance", curve.distance),
                ("proxy", curve.proxy),
                ("gold", curve.gold),
                ("gold_error", curve.gold_draws.std(axis=0)),
            )
        },
    }


def table(curves: Sequence[Curve]) -> str:
    """The Markdown table of docs/results.md."""
    lines = [
        "| method | pairs | alpha | beta | R² | largest d | proxy there | gold there "
        "| highest gold, at d |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for curve in sorted(curves, key=lambda c: (c.method, c.pairs)):
        law, (alpha, beta) = curve.fitted(), curve.errors()
        top, far = int(curve.gold.argmax()), int(curve.distance.argmax())
        lines.append(
            f"| {curve.method} | {curve.pairs} | {law.alpha:.2f} ± {alpha:.2f} "
            f"| {law.beta:.2f} ± {beta:.2f} | {law.r_squared:.3f} | {curve.distance[far]:.1f} "
            f"| {curve.proxy[far]:+.2f} | {curve.gold[far]:+.2f} "
            f"| {curve.gold[top]:+.2f}, {curve.distance[top]:.1f} |"
        )
    return "\n".join(lines)


def write_plot(path: Path, curves: Sequence[Curve]) -> None:
    """A panel per method: gold as points with their law, proxy as a dashed line; the background is
    white, so that it can be read on a dark page as well."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "accord"
    import matplotlib.pyplot as plt

    methods = [m for m in TITLES if any(curve.method == m for curve in curves)]
    figure, axes = plt.subplots(
        1, len(methods), figsize=(4.6 * len(methods), 3.8), constrained_layout=True, squeeze=False
    )
    sizes = sorted({curve.pairs for curve in curves})
    colours = dict(zip(sizes, ("#c2410c", "#0f766e", "#1d4ed8"), strict=False))
    for axis, method in zip(axes[0], methods, strict=True):
        own = sorted((c for c in curves if c.method == method), key=lambda c: c.pairs)
        for curve in own:
            _draw(axis, curve, colours[curve.pairs])
        axis.axhline(0, color="#9ca3af", linewidth=0.8)
        axis.set_title(TITLES[method])
        axis.set_xlabel("d = square root of KL to the start")
    axes[0][0].set_ylabel("score less that of the start")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _draw(axis: Any, curve: Curve, colour: str) -> None:
    law = curve.fitted()
    line = np.linspace(0, curve.distance.max(), 200)
    axis.plot(line, [law.score(d) for d in line], color=colour, linewidth=1.6,
              label=f"gold, {curve.pairs} pairs")  # fmt: skip
    axis.errorbar(curve.distance, curve.gold, yerr=curve.gold_draws.std(axis=0), color=colour,
                  fmt="o", markersize=3, elinewidth=0.7)  # fmt: skip
    order = np.argsort(curve.distance)
    axis.plot(curve.distance[order], curve.proxy[order], color=colour, linewidth=1.0,
              linestyle="--", label=f"proxy, {curve.pairs} pairs")  # fmt: skip
