"""`accord simulate`: the real controller on virtual time gives what can be worked out by hand."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.contracts.errors import Fatal, UserError
from cluster.measure.simulation.loop import VirtualLoop
from cluster.measure.simulation.request import as_row, read_request, show_simulation
from cluster.measure.simulation.scenario import Scenario, draw_lengths
from cluster.measure.simulation.simulate import simulate
from cluster.runs.console import Reporter

SMALL = Scenario(
    workers=8,
    slots=8,
    tokens_per_s=100.0,
    length_mean=500.0,
    max_tokens=4000,
    speed_cv=0.0,
    stragglers=0.0,
    churn_per_hour=0.0,
    prompts_per_step=64,
    samples_per_prompt=4,
    bound=4,
    publish_s=0.0,
    fetch_s=0.1,
    pause_s=0.01,
    score_s=0.0,
    seconds=1200.0,
).with_learner_share(0.8)


def test_virtual_time_passes_at_once_and_in_order() -> None:
    seen: list[tuple[float, str]] = []
    loop = VirtualLoop()

    async def sleeper(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        seen.append((loop.time(), name))

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1000.0):
                await asyncio.Event().wait()
        await asyncio.gather(sleeper("b", 3600.0), sleeper("a", 60.0), sleeper("c", 3600.0))

    began = time.monotonic()
    loop.run(main())
    assert seen == [(1060.0, "a"), (4600.0, "b"), (4600.0, "c")]
    assert time.monotonic() - began < 5.0


def test_waiting_for_nothing_is_said_and_an_error_in_a_callback_is_not_lost() -> None:
    async def forever() -> None:
        await asyncio.Event().wait()

    async def broken() -> None:
        asyncio.get_running_loop().call_soon(lambda: 1 // 0)
        await asyncio.sleep(1.0)

    with pytest.raises(Fatal, match=r"at 0.000 s of virtual time everything waits"):
        VirtualLoop().run(forever())
    with pytest.raises(ZeroDivisionError):
        VirtualLoop().run(broken())


def test_generation_bound_pipeline_runs_at_the_speed_of_its_slots() -> None:
    outcome = simulate(SMALL)
    figures = outcome.figures
    assert figures.step_s == pytest.approx(SMALL.generate_s(), rel=0.03)
    assert figures.generation_busy > 0.97
    assert figures.learner_busy == pytest.approx(0.8, abs=0.03)
    assert figures.goodput == pytest.approx(8 * 8 * 100.0, rel=0.03)
    assert outcome.groups == list(range(len(outcome.groups)))
    assert (figures.violations, figures.waste, outcome.losses) == (0, 0.0, 0)
    assert figures.staleness_max <= 4


def test_learner_bound_pipeline_runs_at_the_speed_of_the_learner() -> None:
    scenario = replace(SMALL, lead=SMALL.bound).with_learner_share(2.0)
    figures = simulate(scenario).figures
    assert figures.step_s == pytest.approx(scenario.learn_s(), rel=0.02)
    assert figures.learner_busy > 0.99
    assert figures.generation_busy == pytest.approx(0.5, abs=0.03)


def test_bound_zero_does_one_thing_after_the_other() -> None:
    outcome = simulate(replace(SMALL, bound=0))
    figures = outcome.figures
    assert figures.step_s > outcome.scenario.generate_s() + outcome.scenario.learn_s()
    assert (figures.staleness_mean, figures.staleness_max) == (0.0, 0)
    assert figures.token_staleness == pytest.approx(0.0, abs=1e-9)


def test_a_bound_too_small_for_the_longest_answers_costs_what_the_model_says() -> None:
    """S = 4 B: with bound 2 Little's law decides, with the longest answer of a step."""
    scenario = replace(SMALL, prompts_per_step=4, max_tokens=1500, bound=2, seconds=600.0)
    scenario = scenario.with_learner_share(0.5)
    measured = simulate(scenario).figures.step_s
    shortest = scenario.prediction(longest=False)
    longest = scenario.prediction(longest=True)
    assert (shortest.bottleneck, longest.bottleneck) == ("staleness", "staleness")
    assert shortest.step_s < measured < 1.15 * longest.step_s


def test_lost_workers_cost_time_and_tokens_but_no_group() -> None:
    scenario = replace(SMALL, churn_per_hour=12.0, restart_s=20.0)
    outcome = simulate(scenario)
    assert outcome.losses > 20
    assert outcome.restarts >= outcome.losses - 8
    assert 0.0 < outcome.figures.waste < 0.2
    assert outcome.groups == list(range(len(outcome.groups)))
    assert outcome.figures.violations == 0


def test_the_same_seed_gives_the_same_trail_and_another_another() -> None:
    scenario = replace(SMALL, churn_per_hour=6.0, stragglers=0.2, speed_cv=0.2, seconds=400.0)
    first, again = simulate(scenario), simulate(scenario)
    assert first.trail.rows == again.trail.rows
    assert len(first.trail.rows) > 25
    assert simulate(replace(scenario, seed=1)).trail.rows != first.trail.rows


def test_answers_do_not_depend_on_who_answers() -> None:
    """More workers, the same groups: the same lengths are trained."""
    few = simulate(replace(SMALL, seconds=400.0))
    many = simulate(replace(SMALL, workers=16, speed_cv=0.3, seconds=400.0))
    steps = min(len(few.trained_tokens), len(many.trained_tokens))
    assert steps > 5
    assert few.trained_tokens[:steps] == pytest.approx(many.trained_tokens[:steps])


def test_scaling_keeps_the_step_time() -> None:
    base = replace(SMALL, seconds=800.0).with_workers(4)
    small, large = simulate(base), simulate(base.with_workers(16))
    assert as_row(small, small)["efficiency"] == 1.0
    assert as_row(large, small)["efficiency"] > 0.95


@pytest.mark.slow
@pytest.mark.parallel
def test_five_hundred_workers_scale_within_the_budget_of_cpu() -> None:
    base = Scenario().with_workers(64).with_learner_share(0.9)
    small, large = simulate(base), simulate(base.with_workers(512))
    row = as_row(large, small)
    assert row["efficiency"] >= 0.95
    assert row["violations"] == 0
    assert row["cpu_us_per_sample"] < 50.0


def test_lengths_have_the_mean_and_the_spread_asked_for() -> None:
    lengths = draw_lengths(Scenario(length_mean=100.0, max_tokens=10**6), 200_000, 1)
    assert lengths.mean() == pytest.approx(100.0, rel=0.02)
    assert lengths.std() / lengths.mean() == pytest.approx(1.0, rel=0.05)
    assert set(draw_lengths(Scenario(lengths=(3.0, 5.0)), 100, 1)) == {3.0, 5.0}


@pytest.mark.parametrize(
    ("words", "workers", "message"),
    [
        (["slotz=3"], "", "'slotz=3' is not one of its settings"),
        (["slots=many"], "", "slots is not a number: 'many'"),
        (["slots=0"], "", "slots has to be at least 1"),
        (["stragglers=2"], "", "stragglers is a share"),
        ([], "64,few", "'64,few' are not numbers of workers"),
    ],
)
def test_nonsense_is_refused(words: list[str], workers: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_request(workers, words, None)


def test_too_short_a_simulation_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="simulate longer"):
        show_simulation("2", ["seconds=100"], None, False, Reporter(quiet=True))
    with pytest.raises(UserError, match=r"there is no metrics\.jsonl"):
        read_request("", [], tmp_path)
