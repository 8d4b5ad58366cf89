"""Which role runs on which core, for costs worked out by hand and for any."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.machine.cores import CorePlan, plan_cores
from cluster.machine.placement import (
    MARGIN,
    SIDES,
    Place,
    Side,
    StepCosts,
    choose,
    idle_cores,
    placement_rows,
    places,
    start,
)


def plan(cores: int, workers: int = 1, **more: int) -> CorePlan:
    return plan_cores(range(cores), workers, pin=True, **more)


def costs(
    workers: float, learner: float, reward: float = 0.0, controller: float = 0.0, ray: float = 0.0
) -> StepCosts:
    return StepCosts(
        workers=workers, learner=learner, reward=reward, controller=controller, ray=ray
    )


W, L, S = "workers", "learner", "spare"
# cores, workers, learner's threads, costs -> places of reward service, controller and Ray, loads
CASES = [
    # The learner has more to do: all go to the worker, 1.0 + 0.03 + 0.02 + 0.05.
    (2, 1, 1, costs(1.0, 1.3, 0.03, 0.02, 0.05), (W, W, W), {W: 1.10, L: 1.30}),
    # The worker has more to do.
    (2, 1, 1, costs(1.3, 1.0, 0.03, 0.02, 0.05), (L, L, L), {W: 1.30, L: 1.10}),
    # As much on either side: they are divided, 0.03 + 0.02 beside 0.05.
    (2, 1, 1, costs(1.0, 1.0, 0.03, 0.02, 0.05), (W, W, L), {W: 1.05, L: 1.05}),
    # Three workers, each 1.0, take a third of what runs beside them.
    (4, 3, 1, costs(3.0, 1.2, 0.3), (W, W, W), {W: 1.1, L: 1.2}),
    # A learner of three threads, 1.0 on each: whatever delays one of its cores delays it.
    (4, 1, 3, costs(1.1, 3.0, 0.3), (L, W, W), {W: 1.1, L: 1.3}),
    # A spare core takes everything it can.
    (3, 1, 1, costs(1.0, 1.0, 0.3, 0.1, 0.1), (S, S, S), {W: 1.0, L: 1.0, S: 0.5}),
    # A reward model that needs a core gets the spare one for itself.
    (3, 1, 1, costs(0.5, 0.3, 1.0, 0.1, 0.1), (S, L, L), {W: 0.5, L: 0.5, S: 1.0}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}")
def test_the_busiest_core_has_as_little_to_do_as_it_can(
    case: tuple[int, int, int, StepCosts, tuple[str, ...], dict[str, float]],
) -> None:
    cores, workers, threads, given_costs, where, loads = case
    dealt = plan(cores, workers, learner_cpus=threads)
    for place in places(dealt):  # wherever they are now, if that is worse
        chosen = choose(dealt, given_costs, dict.fromkeys(SIDES, place)).placement
        assert chosen.longest == pytest.approx(max(loads.values()), rel=MARGIN)
    worst = max(places(dealt), key=lambda place: _alone(place, given_costs))
    chosen = choose(dealt, given_costs, dict.fromkeys(SIDES, worst)).placement
    cost = {side: given_costs.of(side) for side in SIDES}
    assert [chosen.where[side].name for side in SIDES if cost[side]] == [
        name for side, name in zip(SIDES, where, strict=True) if cost[side]
    ]
    assert chosen.loads == pytest.approx(loads)


def _alone(place: Place, given_costs: StepCosts) -> float:
    """Load of a place with all roles beside its own."""
    own = {W: given_costs.workers, L: given_costs.learner, S: 0.0}[place.name]
    return own / len(place.cores) + sum(given_costs.of(side) for side in SIDES) / place.teams


def test_nothing_moves_for_less_than_the_margin() -> None:
    dealt = plan(2)
    workers, learner = places(dealt)
    now: dict[Side, Place] = {"reward service": workers, "controller": workers, "Ray": workers}
    little = choose(dealt, costs(1.0, 0.99, 0.0, 0.0, 0.8 * MARGIN), now)
    assert not little.moved
    assert little.placement.where == now
    assert "no other placement lowers" in little.why
    enough = choose(dealt, costs(1.0, 0.9, 0.0, 0.0, 2 * MARGIN), now)
    assert enough.moved
    assert enough.placement.where["Ray"] == learner
    assert enough.why.endswith("1.000 CPU seconds per step instead of 1.040 (-4%)")
    # And it does not come back for the same numbers.
    again = choose(dealt, costs(1.0, 0.9, 0.0, 0.0, 2 * MARGIN), enough.placement.where)
    assert not again.moved


seconds = st.floats(0, 10)
few = st.integers(1, 8)


@settings(deadline=None, max_examples=50)
@given(
    cores=st.integers(2, 200),
    workers=st.integers(1, 20),
    threads=st.tuples(few, few),
    processes=st.integers(1, 4),
    cpu_s=st.tuples(seconds, seconds, seconds, seconds, seconds),
)
def test_it_is_never_worse_than_all_in_one_place_or_any_other_deal(
    cores: int,
    workers: int,
    threads: tuple[int, int],
    processes: int,
    cpu_s: tuple[float, float, float, float, float],
) -> None:
    """All to the workers' cores or all to the learner's, whoever waits more: that was the rule
    before. Both are among the deals."""
    dealt = plan(
        cores,
        workers,
        worker_cpus=threads[0],
        learner_cpus=threads[1],
        learner_processes=processes,
    )
    every = places(dealt)
    if not every:  # the workers leave no core: nothing is pinned
        assert workers * min(threads[0], cores) >= cores
        return
    assert sorted(core for place in every for core in place.cores) == list(range(cores))
    given_costs = costs(*cpu_s)
    own = {W: given_costs.workers, L: given_costs.learner, S: 0.0}
    for where in product(every, repeat=3):
        by_hand = max(
            own[place.name] / len(place.cores)
            + sum(given_costs.of(s) for s, p in zip(SIDES, where, strict=True) if p == place)
            / place.teams
            for place in every
        )
        now: dict[Side, Place] = dict(zip(SIDES, where, strict=True))
        choice = choose(dealt, given_costs, now)
        assert choice.placement.longest <= by_hand * (1 + 1e-9)
        assert choice.moved or choice.placement.where == now


def test_a_run_starts_as_it_is_dealt_out() -> None:
    assert {side: place.cores for side, place in start(plan(2)).items()} == {"reward service": (1,)}
    assert {side: place.cores for side, place in start(plan(5, 2)).items()} == {
        "reward service": (3, 4)
    }
    unbound = plan_cores(range(4), 1, pin=False)
    assert (places(unbound), start(unbound)) == ((), {})
    with pytest.raises(ValueError, match="cores of its own"):
        choose(unbound, costs(1, 1), {})
    # Every role on every core, as a benchmark may ask for.
    assert places(CorePlan(((0,), (1,)), (0, 1), ())) == ()


def test_rows_say_who_runs_where() -> None:
    rows = placement_rows(plan(2))
    assert [(row.cores, row.roles, row.cpu_s) for row in rows] == [
        ("core 0", ["1 rollout worker"], None),
        ("core 1", ["learner", "reward service"], None),
        ("any core", ["controller", "Ray"], None),
    ]
    dealt = plan(16, 4, worker_cpus=2, learner_cpus=4)
    chosen = choose(dealt, costs(8.0, 3.0, 0.5, 0.25, 0.25), start(dealt)).placement
    rows = placement_rows(dealt, chosen, step_s=1.25)
    assert [(row.cores, row.roles, row.cpu_s, row.busy) for row in rows] == [
        ("cores 0-7", ["4 rollout workers"], 1.0, 0.8),
        ("cores 8-11", ["learner"], 0.75, 0.6),
        ("cores 12-15", ["reward service", "controller", "Ray"], 0.25, 0.2),
    ]
    assert [row.roles for row in placement_rows(plan_cores(range(4), 1, pin=False))] == [
        ["rollout workers", "learner", "reward service", "controller", "Ray"]
    ]


def test_cores_without_work_are_named_with_what_would_use_them() -> None:
    assert idle_cores(plan(2)) == idle_cores(plan(3)) == ""
    assert idle_cores(plan(5)) == "2 cores idle: rollout.workers=3 or learner.cpus=3 would use them"
    # 1.5 CPU seconds in steps of 1 s need two of the three spare cores.
    slow_workers = costs(1.0, 0.5, 1.0, 0.25, 0.25)
    assert idle_cores(plan(5), slow_workers, 1.0) == "1 core idle: rollout.workers=2 would use it"
    slow_learner = costs(0.5, 1.0, 1.0, 0.25, 0.25)
    assert idle_cores(plan(5), slow_learner, 1.0) == "1 core idle: learner.cpus=2 would use it"
    assert idle_cores(plan(5), costs(1.0, 1.0, 3.0), 1.0) == ""
    # One core is too few for a worker of four threads.
    assert idle_cores(plan(7, 1, worker_cpus=4)) == "1 core idle: learner.cpus=2 would use it"


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_cost_is_a_number(value: float) -> None:
    with pytest.raises(ValueError, match="learner"):
        costs(1.0, value)
