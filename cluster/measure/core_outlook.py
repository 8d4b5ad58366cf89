"""Which role will run on which core, and what it will cost there: for `accord plan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.assembly.core_record import KnownCosts
from cluster.contracts.config.train import TrainConfig
from cluster.machine.cores import CorePlan
from cluster.machine.placement import (
    LEARNER,
    WORKERS,
    Placement,
    PlacementRow,
    StepCosts,
    choose,
    idle_cores,
    placement_rows,
    places,
    start,
)

# CPU seconds of the controller per step and per group, and of Ray's processes: what runs of the
# examples took (AMD EPYC). A probe starts neither; a run measures its own.
CONTROLLER_S = (0.030, 0.0010)
RAY_S = (0.045, 0.0004)


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreOutlook:
    """``cpu_s``: CPU seconds per step of each role; None where nobody has measured them, and
    ``source`` then says how to. ``why``: the reason of the placement. ``idle``: cores that have
    nothing to do; "" without such. ``placement``: with its loads; None without costs."""

    cpu_s: StepCosts | None
    rows: list[PlacementRow]
    source: str
    why: str
    idle: str = ""
    placement: Placement | None = None

    def beside(self) -> Mapping[str, float]:
        """Seconds per step that other roles take from the workers' and the learner's cores; 0
        where that is not known."""
        return self.placement.beside if self.placement else dict.fromkeys((WORKERS, LEARNER), 0.0)


def core_outlook(
    config: TrainConfig, cores: CorePlan, costs: StepCosts | None, source: str, step_s: float = 0.0
) -> CoreOutlook:
    """Of a run in which the roles cost so much. ``step_s``: seconds per step; 0: not known."""
    idle = idle_cores(cores, costs, step_s)
    placement = None
    if not places(cores):
        why = (
            "no role has cores of its own: cluster.pin_cores is off, the workers leave no core, or "
            "roles use GPUs or other machines; the operating system deals the cores out"
        )
    elif not config.staleness.bound:
        why = (
            "workers and learner take turns (staleness.bound = 0), so a core is free at every "
            "moment, and the operating system finds it"
        )
    elif costs is None:
        why = (
            "a run starts like this, measures what each role costs, and then moves the reward "
            "service, the controller and Ray"
        )
    else:
        choice = choose(cores, costs, start(cores))
        placement, why = choice.placement, choice.why
    rows = placement_rows(cores, placement, step_s)
    return CoreOutlook(
        cpu_s=costs, rows=rows, source=source, why=why, idle=idle, placement=placement
    )


def probed_costs(
    config: TrainConfig, measured: Mapping[str, Mapping[str, Any]], known: KnownCosts | None
) -> tuple[StepCosts, str]:
    """What the roles cost by a probe, and where the numbers are from. A probe starts no Ray and no
    controller: theirs are of an earlier run, or an estimate."""
    engine, reward, learner = (measured[role] for role in ("engine", "reward", "learner"))
    groups = config.batch.prompts_per_step
    tokens = groups * config.batch.samples_per_prompt * engine["mean_length"]
    before = known.costs if known else None
    costs = StepCosts(
        workers=tokens / engine["tokens_per_s"] * engine["cpu_share"],
        learner=learner["learn_cpu_s"],
        reward=reward["scoring_cpu_s"],
        controller=before.controller if before else CONTROLLER_S[0] + groups * CONTROLLER_S[1],
        ray=before.ray if before else RAY_S[0] + groups * RAY_S[1],
    )
    beside = known.source if known and before else "estimated from the number of groups"
    return costs, f"measured by this probe; the controller's and Ray's {beside}"


def core_lines(found: CoreOutlook) -> list[str]:
    """The table, then what each role costs, and why the roles run where they do."""
    lines = [f"  {'cores':<14} {'CPU s per step':>14} {'busy':>6}   who runs there"]
    for row in found.rows:
        load = "" if row.cpu_s is None else f"{row.cpu_s:.3f}"
        busy = "" if row.busy is None else f"{row.busy:.0%}"
        who = ", ".join(row.roles) or "nobody"
        lines.append(f"  {row.cores:<14} {load:>14} {busy:>6}   {who}")
    if found.cpu_s is not None:
        costs = found.cpu_s
        lines.append(
            f"  CPU seconds per step: workers {costs.workers:.3f}, learner {costs.learner:.3f}, "
            f"reward service {costs.reward:.3f}, controller {costs.controller:.3f}, "
            f"Ray {costs.ray:.3f}"
        )
    lines.append(f"  costs: {found.source}")
    lines.append(f"  why: {found.why}")
    return [*lines, f"  {found.idle}"] if found.idle else lines
