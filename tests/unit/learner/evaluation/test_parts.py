"""Calibration, frontier and samples."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cluster.contracts.errors import UserError
from learner.evaluation import calibration, frontier
from learner.evaluation.samples import (
    Sample,
    choose,
    distinct_ngrams,
    read_samples,
    text_stats,
    write_samples,
)


def test_ece_by_hand() -> None:
    # Bin [0.6, 0.7): mean 0.65, true half the time; bin [0.9, 1]: mean 0.95, always true.
    p, y = [0.62, 0.68, 0.9, 1.0], [1, 0, 1, 1]
    assert calibration.ece(p, y) == pytest.approx(0.5 * 0.15 + 0.5 * 0.05)
    bins = calibration.reliability(p, y)
    assert [(b.low, b.high, b.count) for b in bins] == [(0.6, 0.7, 2), (0.9, 1.0, 2)]
    assert [b.frequency for b in bins] == [0.5, 1.0]


def test_bin_edges_hold_their_lower_end() -> None:
    bins = calibration.reliability([0.0, 0.3, 0.6, 0.7, 1.0], [0, 0, 1, 1, 1])
    assert [round(b.low, 9) for b in bins] == [0.0, 0.3, 0.6, 0.7, 0.9]


def test_a_calibrated_model_has_almost_no_ece_and_an_overconfident_one_has() -> None:
    rng = np.random.default_rng(0)
    margin = rng.normal(0, 2, 20_000)
    flip = rng.random(20_000) < 1 / (1 + np.exp(-margin))
    margin = np.where(flip, margin, -margin)  # chosen - rejected of a calibrated pairwise model
    assert calibration.ece(*calibration.confidences(margin)) < 0.015
    assert calibration.ece(*calibration.confidences(3 * margin)) > 0.1


def test_confidence_is_in_the_favourite() -> None:
    p, y = calibration.confidences([2.0, -2.0, 0.0])
    assert p == pytest.approx([0.880797, 0.880797, 0.5])
    assert y.tolist() == [1, 0, 0.5]


@pytest.mark.parametrize(
    ("p", "y"), [([], []), ([0.5], [0.5, 1]), ([1.5], [1]), ([math.nan], [1]), ([0.5], [2])]
)
def test_calibration_refuses_what_is_no_probability(p: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match=r"probabilit|label"):
        calibration.ece(p, y)


def rows(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    return [
        {"step": i, "objective/kl": kl, "objective/scores": score}
        for i, (kl, score) in enumerate(pairs)
    ]


def test_points_smooth_skip_and_never_take_the_root_of_a_negative_kl() -> None:
    found = frontier.points([*rows((-0.1, 1.0), (4.0, 3.0)), {"step": 9, "objective/kl": 1.0}])
    assert found == [frontier.Point(0, 0.0, 1.0), frontier.Point(1, 2.0, 3.0)]
    smooth = frontier.points(rows((0, 1), (2, 3), (6, 5)), window=2)
    assert smooth[-1] == frontier.Point(2, 2.0, 4.0)


def test_the_frontier_keeps_only_what_nothing_beats() -> None:
    found = frontier.points(rows((0, 0), (1, 1), (4, 0.5), (9, 2), (4, 1.5), (16, 2)))
    kept = frontier.frontier(found)
    assert [(p.step, p.distance, p.score) for p in kept] == [
        (0, 0, 0),
        (1, 1, 1),
        (4, 2, 1.5),
        (3, 3, 2),
    ]
    best = frontier.best_point(found)
    assert best is not None
    assert best.step == 3
    assert frontier.best_point([]) is None


def test_the_fit_recovers_alpha_beta_and_the_peak() -> None:
    d = np.linspace(0, 20, 60)
    score = 0.3 + d * (1.2 - 0.5 * np.log(np.where(d > 0, d, 1)))
    found = frontier.fit(
        [frontier.Point(i, x, y) for i, (x, y) in enumerate(zip(d, score, strict=True))]
    )
    assert found is not None
    assert (found.start, found.alpha, found.beta) == pytest.approx((0.3, 1.2, 0.5))
    assert found.peak == pytest.approx(math.exp(1.4))
    rising = frontier.fit([frontier.Point(i, float(i), 2.0 * i) for i in range(5)])
    assert rising is not None
    assert rising.peak is None
    assert frontier.fit([frontier.Point(0, 1.0, 1.0)]) is None


@pytest.mark.parametrize(
    ("method", "law", "peak"),
    [
        ("best-of-n", lambda d: d * (1.2 - 0.5 * d), 1.2),
        ("rl", lambda d: d * (1.2 - 0.5 * math.log(d)), math.exp(1.4)),
    ],
)
def test_both_laws_of_centred_scores(
    method: frontier.Method, law: Callable[[float], float], peak: float
) -> None:
    distances = [0.1, 0.5, 1.0, 2.0, 4.0]
    exact = [frontier.Point(i, d, law(d)) for i, d in enumerate(distances)]
    found = frontier.fit(exact, method, start=0.0)
    assert found is not None
    assert (found.start, found.alpha, found.beta) == pytest.approx((0, 1.2, 0.5))
    assert (found.r_squared, found.peak) == pytest.approx((1, peak))
    assert [found.score(d) for d in [0.0, *distances]] == pytest.approx([0.0, *map(law, distances)])


def test_r_squared_is_the_share_of_the_variance_that_the_law_explains() -> None:
    """Scores 0, 1, 0, 1, 0 at 1 to 5: the best parabola through (0, 0), by hand."""
    found = frontier.fit(
        [frontier.Point(i, float(i), float(i % 2 == 0)) for i in range(1, 6)],
        "best-of-n",
        start=0.0,
    )
    assert found is not None
    # Normal equations: 55 a - 225 b = 6, 225 a - 979 b = 20; spread 6/5, squares 2 - 6 a + 20 b.
    a, b = (6 * 979 - 225 * 20) / (55 * 979 - 225**2), (6 * 225 - 55 * 20) / (55 * 979 - 225**2)
    assert (found.alpha, found.beta) == pytest.approx((a, b))
    assert found.r_squared == pytest.approx(1 - (2 - 6 * a + 20 * b) / 1.2)


def sample(name: str, before: float | None, after: float | None) -> Sample:
    return Sample(
        prompt=name, before="b", after="a " + name, before_score=before, after_score=after
    )


def test_samples_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    hostile = "</script>\u202e\u2028 {{7*7}}\n\ud800"
    written = [sample("x", 0.5, 1.5), Sample(prompt=hostile, before="", after=hostile)]
    write_samples(path, written)
    assert read_samples(path) == written
    assert [p.name for p in tmp_path.iterdir()] == ["samples.jsonl"]


def test_chat_prompts_become_text(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    path.write_text(json.dumps({"prompt": prompt, "before": "", "after": "Hello"}))
    assert read_samples(path)[0].prompt == "system: Be kind.\n\nuser: Hi"


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"prompt": "p", "before": "b"}', "no text under 'after'"),
        ('{"prompt": "p", "before": "b", "after": "a", "after_score": NaN}', "after_score is nan"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, cause: str) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"prompt": "p", "before": "b", "after": "a"}\n' + line)
    with pytest.raises(UserError, match=rf"samples\.jsonl:2: .*{cause}"):
        read_samples(path)


def test_the_choice_shows_best_typical_worst_and_blind_random_ones() -> None:
    samples = [sample(str(i), 0.0, float(i - 3)) for i in range(11)]
    chosen = choose(samples, random_count=2, seed=1)
    by_reason = [(c.reason, c.sample.gain) for c in chosen[:3]]
    assert by_reason == [
        ("largest improvement", 7.0),
        ("worst regression", -3.0),
        ("typical (median change)", 2.0),
    ]
    assert [c.reason for c in chosen[3:]] == ["random", "random"]
    assert len({c.sample.prompt for c in chosen}) == 5
    assert chosen == choose(samples, random_count=2, seed=1)
    blind = [sample(str(i), None, None) for i in range(11)]
    first = {c.sample.prompt for c in choose(blind, random_count=5, seed=1)}
    assert {c.sample.prompt for c in chosen[3:]} <= first | {"10", "5", "0"}
    other = {c.sample.prompt for c in choose(blind, random_count=5, seed=2)}
    assert first != other
    assert len(choose(samples, random_count=100)) == 11
    assert choose([]) == []
    assert choose([sample("a", 0, 1), sample("b", 0, 2)])[1].reason == "smallest improvement"


def test_repetition_and_length() -> None:
    assert distinct_ngrams("a b a b a b", 2) == pytest.approx(2 / 5)
    assert distinct_ngrams("one", 3) == 1.0
    stats = text_stats(["a a a a", "a b"])
    assert (stats.mean_words, stats.median_words, stats.longest_words) == (3, 3, 4)
    assert stats.repeated_3grams == pytest.approx(0.25)  # half of "a a a a", none of "a b"
