"""Curves of the over-optimisation benchmark, on scores that are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.overoptimisation_curves import (
    BLOCK,
    best_of_n_curve,
    ppo_curve,
    results_of,
    table,
    write_plot,
)


def test_best_of_n_is_centred_and_gold_follows_what_the_proxy_knows() -> None:
    rng = np.random.default_rng(0)
    proxy = rng.normal(size=(40, 64))
    gold = 3.0 + 0.5 * proxy
    curve = best_of_n_curve(100, proxy, gold)
    assert curve.places[0] == 1
    assert curve.places[-1] == 64
    assert (curve.distance[0], curve.gold[0], curve.proxy[0]) == pytest.approx((0, 0, 0))
    assert curve.gold == pytest.approx(0.5 * curve.proxy)
    assert curve.agreement == 1.0
    # Of a normal score, the best of 64 is 2.37 standard deviations above the mean.
    assert curve.proxy[-1] == pytest.approx(2.37, abs=0.15)
    assert curve.gold_draws.std(axis=0)[-1] == pytest.approx(0.5 * 0.4 / 40**0.5, rel=0.5)
    assert curve.fitted().r_squared > 0.99


def test_ppo_points_are_means_over_blocks_of_steps() -> None:
    steps = np.repeat(np.arange(1, 4 * BLOCK + 1), 4)
    scores = {
        "step": steps,
        "group": np.repeat(np.arange(8 * BLOCK), 2),
        "proxy": 1.0 + steps,
        "gold": np.full(len(steps), 5.0),
        "kl": steps**2.0,
    }
    curve = ppo_curve(100, scores, (1.0, 2.0))
    assert curve.places == [BLOCK, 2 * BLOCK, 3 * BLOCK, 4 * BLOCK]
    assert curve.distance[0] == pytest.approx(np.mean([n**2 for n in range(1, BLOCK + 1)]) ** 0.5)
    assert curve.proxy[1] == pytest.approx(BLOCK + (BLOCK + 1) / 2)
    assert curve.gold.tolist() == [3.0] * 4
    assert curve.gold_draws.shape[1] == 4
    assert np.ptp(curve.gold_draws) == 0
    assert curve.distance_draws.mean(axis=0) == pytest.approx(curve.distance, rel=0.05)


def test_results_table_and_plot(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    proxy = rng.normal(size=(10, 16))
    curve = best_of_n_curve(400, proxy, proxy + rng.normal(size=proxy.shape))
    record = results_of([curve])["curves"][0]
    assert (record["method"], record["pairs"], record["n"][-1]) == ("best-of-n", 400, 16)
    assert len(record["gold"]) == len(record["distance"]) == len(record["gold_error"])
    assert "| best-of-n | 400 |" in table([curve])
    write_plot(tmp_path / "plot.svg", [curve])
    assert "<svg" in (tmp_path / "plot.svg").read_text(encoding="utf-8")
