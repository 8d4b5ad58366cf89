from __future__ import annotations

from cluster.contracts.metrics import last
from cluster.contracts.records import Canary, StepResult, WeightManifest
from learner.step_names import StepNames


def result(step: int, tokens: int) -> StepResult:
    canary = Canary(token_ids=(1, 2), logprobs=(-1.0,), tolerance=1e-3)
    manifest = WeightManifest(
        version=step + 1, tensors=(), canary=canary, transport="fake", locator=None
    )
    metrics = (last("async/staleness_mean", 1.0),)
    return StepResult(
        step=step, version=step + 1, metrics=metrics, manifest=manifest, trained_tokens=tokens
    )


def test_a_step_is_named_with_the_numbers_of_the_one_before() -> None:
    time = [0.0]
    names = StepNames(lambda: time[0])
    assert names.of(40) == ""  # nothing is known yet
    time[0] = 10.0
    names.done(result(40, 12_000))
    assert names.of(41) == "step 42, after step 41: 1.2k tok/s, staleness 1"


def test_quick_steps_share_a_name_since_ray_keeps_counters_for_each() -> None:
    time = [0.0]
    names = StepNames(lambda: time[0])
    given = []
    for step in range(600):
        given.append(names.of(step))
        time[0] += 0.1
        names.done(result(step, 50))
    assert given.count("") == 598
    assert given[1] == "step 2, after step 1: 500 tok/s, staleness 1"
