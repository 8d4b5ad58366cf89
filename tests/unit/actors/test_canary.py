"""The canary: limits from the noise an engine has shown, and the nearer of two versions."""

from __future__ import annotations

import random

import pytest

from actors.canary import CanaryCheck, distance
from cluster.contracts.errors import EngineFailure, WeightMismatch
from cluster.contracts.records import Canary

TOKENS = tuple(range(32))
BASE = tuple(-1.0 - 0.1 * (i % 7) for i in range(31))


def canary(shift: float = 0.0, tolerance: float | None = None) -> Canary:
    return Canary(token_ids=TOKENS, logprobs=tuple(x + shift for x in BASE), tolerance=tolerance)


def noisy(wanted: Canary, noise: float, seed: int = 0) -> list[float]:
    """What an engine answers whose rounding noise is `noise`; one answer is off by all of it."""
    drawn = random.Random(seed)
    answers = [x + drawn.uniform(-noise, noise) for x in wanted.logprobs]
    answers[3] = wanted.logprobs[3] + noise
    return answers


def test_the_first_canary_is_held_to_the_ceiling_alone() -> None:
    wanted = canary()
    found = CanaryCheck().compare(wanted, noisy(wanted, 9e-4), 0, "float32")
    assert found == pytest.approx(9e-4)
    with pytest.raises(WeightMismatch, match=r"differ .* by 0.0011 \(limit 0.001\)"):
        CanaryCheck().compare(wanted, noisy(wanted, 1.1e-3), 0, "float32")


def test_later_ones_are_held_to_the_noise_the_engine_has_shown() -> None:
    check, wanted = CanaryCheck(), canary()
    check.compare(wanted, noisy(wanted, 5e-6), 0, "float32")
    check.compare(wanted, noisy(wanted, 9e-5), 1, "float32")  # under the floor of 1e-4
    check = CanaryCheck()
    check.compare(wanted, noisy(wanted, 5e-6), 0, "float32")
    with pytest.raises(WeightMismatch, match=r"limit 0.0001"):
        check.compare(wanted, noisy(wanted, 2e-4), 1, "float32")


def test_a_tolerance_that_was_set_is_the_limit() -> None:
    check, wanted = CanaryCheck(), canary(tolerance=5e-3)
    check.compare(wanted, noisy(wanted, 5e-6), 0, "float32")
    check.compare(wanted, noisy(wanted, 4e-3), 1, "float32")
    with pytest.raises(WeightMismatch, match=r"limit 0\.005"):
        check.compare(wanted, noisy(wanted, 6e-3), 2, "float32")


def test_noise_that_grows_slowly_is_followed() -> None:
    """A policy sharpens as it learns, and its rounding noise grows with its logits."""
    check, noise = CanaryCheck(), 5e-6
    for version in range(12):
        wanted = canary(shift=0.01 * version)
        check.compare(wanted, noisy(wanted, noise, version), version, "float32")
        noise = min(9e-4, noise * 1.6)


def test_the_answer_must_be_nearer_to_the_new_canary() -> None:
    """6e-4 is what a step at lr 1e-5 moves the canary by: under the tolerance, over the noise."""
    old, new = canary(), canary(shift=8e-5)
    check = CanaryCheck()
    check.compare(old, noisy(old, 5e-6), 0, "float32")
    with pytest.raises(WeightMismatch, match="nearer to the version before"):
        check.compare(new, noisy(old, 5e-6, seed=1), 1, "float32")
    check = CanaryCheck()
    check.compare(old, noisy(old, 5e-6), 0, "float32")
    assert check.compare(new, noisy(new, 5e-6, seed=1), 1, "float32") < 1e-5


def test_canaries_that_hardly_differ_are_not_told_apart() -> None:
    old, new = canary(), canary(shift=1e-5)
    check = CanaryCheck()
    check.compare(old, noisy(old, 5e-6), 0, "float32")
    assert check.compare(new, noisy(old, 5e-6, seed=1), 1, "float32") < 5e-5


def test_an_engine_without_noise_so_far_may_show_some_later() -> None:
    """On one machine and thread the first canaries can agree bit for bit."""
    old, new = canary(), canary(shift=3e-7)
    check = CanaryCheck()
    check.compare(old, list(old.logprobs), 0, "float32")
    assert check.compare(new, [x + 4e-6 for x in new.logprobs], 1, "float32") < 5e-6
    check = CanaryCheck()
    check.compare(old, list(old.logprobs), 0, "float32")
    check.compare(new, [x - 3e-6 for x in new.logprobs], 1, "float32")  # nearer to the old one


def test_one_improbable_token_does_not_fail_bfloat16() -> None:
    wanted = canary()
    got = noisy(wanted, 0.02)
    got[9] += 0.9
    assert distance(got, wanted.logprobs, "float32") > 0.8
    assert CanaryCheck().compare(wanted, got, 0, "bfloat16") < 0.02
    with pytest.raises(WeightMismatch, match="differ"):
        CanaryCheck().compare(wanted, [x + 0.6 for x in wanted.logprobs], 0, "bfloat16")


def test_a_number_that_is_not_finite_makes_the_engine_unfit() -> None:
    wanted = canary()
    with pytest.raises(EngineFailure, match="not finite"):
        CanaryCheck().compare(wanted, [float("nan"), *wanted.logprobs[1:]], 0, "float32")
    with pytest.raises(WeightMismatch, match="got 3"):
        CanaryCheck().compare(wanted, [0.0] * 3, 0, "float32")
