"""Which role runs on which core, from what each role costs: CPU seconds per learner step.

Rollout workers and learner compute on cores of their own (``cores.py``). Three roles run beside
them: the reward service, the controller, and Ray's own processes. They go where the most loaded
core becomes least loaded. Arithmetic only: nothing is measured or moved here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Literal, get_args

from cluster.machine.cores import CorePlan, cores_text, counted

Side = Literal["reward service", "controller", "Ray"]
SIDES: tuple[Side, ...] = get_args(Side)
MARGIN = 0.02  # of the most loaded core; a smaller gain is noise, and nothing moves for it
WORKERS, LEARNER, SPARE = "workers", "learner", "spare"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """CPU seconds per learner step, of all processes of a role together.

    The learner's include gathering and publishing the weights, the workers' loading them.
    """

    workers: float
    learner: float
    reward: float
    controller: float
    ray: float

    def __post_init__(self) -> None:
        for name, seconds in asdict(self).items():
            if not (math.isfinite(seconds) and seconds >= 0):
                raise ValueError(f"{name} = {seconds}: a cost is a number, and not negative")

    def of(self, side: Side) -> float:
        return {"reward service": self.reward, "controller": self.controller, "Ray": self.ray}[side]


@dataclass(frozen=True, slots=True)
class Place:
    """Cores that compute for one role, or for none (``spare``).

    ``teams``: groups of cores that work independently of each other: the cores of one worker, all
    cores of the learner, each spare core. The cores of a team wait for each other, so what runs on
    one of them delays them all. Between teams the work moves: prompts go to the worker that has
    least, and the operating system moves processes.
    """

    name: str
    cores: tuple[int, ...]
    teams: int
    role: str  # for people


@dataclass(frozen=True, slots=True)
class Placement:
    """``where``: the place of each role beside workers and learner; a role that is not in it runs
    on any core. By place: ``loads``, the predicted CPU seconds per step of its most loaded core;
    ``beside``, how many of them are not its own role's."""

    where: Mapping[Side, Place]
    loads: Mapping[str, float]
    beside: Mapping[str, float]

    @property
    def longest(self) -> float:
        return max(self.loads.values())


@dataclass(frozen=True, slots=True)
class Choice:
    """The placement from now on, whether it is a new one, and the reason in a sentence."""

    placement: Placement
    moved: bool
    why: str


def places(plan: CorePlan) -> tuple[Place, ...]:
    """Of a plan with cores of their own for workers and learner; none where nothing is pinned."""
    if not plan.workers or not plan.reward:
        return ()
    own = tuple(sorted({core for cores in plan.workers for core in cores}))
    workers = counted(len(plan.workers), "rollout worker")
    found = [Place(WORKERS, own, len(plan.workers), workers)]
    found.append(Place(LEARNER, plan.learner, 1, "learner"))
    if not plan.crowded:
        found.append(Place(SPARE, plan.reward, len(plan.reward), ""))
    return tuple(found)


def start(plan: CorePlan) -> dict[Side, Place]:
    """Of a run that knows no costs: the reward service on spare cores, or with the learner where
    there are none. The controller and Ray run on any core."""
    every = places(plan)
    return {"reward service": every[-1]} if every else {}


def choose(plan: CorePlan, costs: StepCosts, now: Mapping[Side, Place]) -> Choice:
    """Where the roles beside workers and learner run from now on. ``now``: where they run.

    Of all ways to deal three roles out to at most three places, the one whose most loaded core has
    the smallest load; where that is equal, the second most loaded one decides, and so on.
    Nothing moves unless that load falls by ``MARGIN``. Raises ValueError without places.
    """
    every = places(plan)
    if not every:
        raise ValueError("no role has cores of its own")
    current = _placed(every, costs, now)
    dealt = (dict(zip(SIDES, chosen, strict=True)) for chosen in product(every, repeat=len(SIDES)))
    best = min(
        (_placed(every, costs, where) for where in dealt),
        key=lambda placement: sorted(placement.loads.values(), reverse=True),
    )
    before, after = current.longest, best.longest
    if after >= before * (1 - MARGIN):
        why = (
            f"no other placement lowers the load of the busiest core ({before:.3f} CPU seconds per "
            f"step) by {MARGIN:.0%} or more"
        )
        return Choice(current, False, why)
    why = (
        f"the busiest core has {after:.3f} CPU seconds per step instead of {before:.3f} "
        f"({after / before - 1:.0%})"
    )
    return Choice(best, True, why)


def idle_cores(plan: CorePlan, costs: StepCosts | None = None, step_s: float = 0.0) -> str:
    """Spare cores that have nothing to do, and which setting would use them; "" without such.

    ``costs``, ``step_s``: CPU seconds and seconds per step, where they are known; one spare core
    counts as needed otherwise.
    """
    spare = next((place for place in places(plan) if place.name == SPARE), None)
    if spare is None:
        return ""
    needed = 1
    if costs is not None and step_s > 0:
        needed = max(1, math.ceil(sum(costs.of(side) for side in SIDES) / step_s))
    idle = len(spare.cores) - needed
    if idle < 1:
        return ""
    keys = [f"learner.cpus={plan.learner_threads + idle}"]
    if more := idle // plan.worker_threads:
        keys.insert(0, f"rollout.workers={len(plan.workers) + more}")
    if costs is not None:  # the slower of the two can use them
        generation, training = (
            seconds / len(place.cores)
            for seconds, place in zip((costs.workers, costs.learner), places(plan), strict=False)
        )
        keys = keys[:1] if generation >= training else keys[-1:]
    return f"{counted(idle, 'core')} idle: {' or '.join(keys)} would use {_them(idle)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRow:
    """``cpu_s``: CPU seconds per step of the most loaded of these cores; ``busy``: its share of a
    step; None where they are not known."""

    cores: str
    roles: list[str]
    cpu_s: float | None = None
    busy: float | None = None


def placement_rows(
    plan: CorePlan, placement: Placement | None = None, step_s: float = 0.0
) -> list[PlacementRow]:
    """Who runs on which cores. ``placement``: with its loads, for a step of ``step_s`` seconds;
    None: where a run starts that knows no costs."""
    every = places(plan)
    where = placement.where if placement else start(plan)
    rows = []
    for place in every:
        beside = [side for side in SIDES if where.get(side) == place]
        load = placement.loads[place.name] if placement else None
        rows.append(
            PlacementRow(
                cores=cores_text(place.cores),
                roles=[*([place.role] if place.role else []), *beside],
                cpu_s=load,
                busy=load / step_s if load is not None and step_s > 0 else None,
            )
        )
    roles = [*([] if every else ["rollout workers", "learner"])]
    roles += [side for side in SIDES if side not in where]
    return rows + ([PlacementRow(cores="any core", roles=roles)] if roles else [])


def _placed(every: Sequence[Place], costs: StepCosts, where: Mapping[Side, Place]) -> Placement:
    own = {WORKERS: costs.workers, LEARNER: costs.learner, SPARE: 0.0}
    cores = sum(len(place.cores) for place in every)
    anywhere = sum(costs.of(side) for side in SIDES if side not in where) / cores
    beside = {
        place.name: anywhere
        + sum(costs.of(side) for side, found in where.items() if found == place) / place.teams
        for place in every
    }
    loads = {place.name: own[place.name] / len(place.cores) + beside[place.name] for place in every}
    return Placement(dict(where), loads, beside)


def _them(count: int) -> str:
    return "it" if count == 1 else "them"
