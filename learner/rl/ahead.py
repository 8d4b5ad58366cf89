"""What an idle learner computes of its next step before all groups of the step are there.

The passes before the update (`measuring_pass`) are run part by part, whether a part is complete
early or not. They depend on its tokens and on the weights, which stay as they are until the step.
So a step that finds some of its parts measured is equal, bit for bit, to one that measures them
itself.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cluster.contracts.records import StepInput
from cluster.contracts.stream_parts import part_of
from learner.rl.forward import Networks
from learner.rl.measuring_pass import GraphMemory, PartPasses, PassPlan, plan_passes, run_passes
from learner.rl.microbatch import Microbatch, Microbatches
from learner.rl.own_rows import OwnRows
from learner.rl.policies import by_policy
from learner.rl.rollouts import Array, RolloutBatch, as_table, read_batch
from learner.settings import LearnerSettings

if TYPE_CHECKING:
    from learner.rl.checkpoint import TrainerState


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """A part of one policy's rows, and what was measured of it under the plan."""

    plan: PassPlan
    micros: Sequence[Microbatch]
    passes: PartPasses


@dataclass(slots=True, eq=False)
class PartsAhead:
    """One policy's parts of the next step. graphs: what their waiting graphs may take, None before
    the first."""

    graphs: GraphMemory | None = None
    parts: dict[int, _Part] = field(default_factory=dict)

    def take(self, part: int, plan: PassPlan, micros: Sequence[Microbatch]) -> PartPasses | None:
        """What was measured, where it was measured on these very tokens and under this plan."""
        found = self.parts.pop(part, None)
        return found.passes if found is not None and _fits(found, plan, micros) else None


@dataclass(slots=True, eq=False)
class WorkAhead:
    """Of all policies. seconds, cpu_s: what the work on the next step has taken so far."""

    seconds: float = 0.0
    cpu_s: float = 0.0
    _of: dict[str, PartsAhead] = field(default_factory=dict)

    def work(
        self,
        batch: StepInput,
        states: Sequence[TrainerState],
        settings: LearnerSettings,
        *,
        value_only: bool,
    ) -> None:
        """Measure the parts of step `batch.step` that its groups make up. Raises what the step
        itself would raise."""
        began, cpu_began = time.perf_counter(), time.process_time()
        try:
            samples = settings.batch.samples_per_prompt
            tables = [as_table(payload) for payload in batch.payloads]
            rollouts = read_batch(tables, batch.group_ids, samples)
            rows = by_policy(rollouts, [one.policy for one in states], samples)
            for state in states:
                if state.policy in rows:
                    self._measure(state, rows[state.policy], settings, value_only)
        finally:
            self.seconds += time.perf_counter() - began
            self.cpu_s += time.process_time() - cpu_began

    def of(self, policy: str) -> PartsAhead:
        """Its parts, which are the caller's from now on."""
        return self._of.pop(policy, PartsAhead())

    def forget(self) -> None:
        self._of.clear()

    def next_step(self) -> None:
        """The step is done: nothing is known of the one after it."""
        self.forget()
        self.seconds = self.cpu_s = 0.0

    def _measure(
        self,
        state: TrainerState,
        rollouts: RolloutBatch,
        settings: LearnerSettings,
        value_only: bool,
    ) -> None:
        networks = state.networks
        plan = plan_passes(settings, networks, value_only)
        micros = Microbatches(
            OwnRows.all_of(rollouts),
            settings.learner.tokens_per_microbatch,
            networks.device,
            packed=networks.packed,
            part_of_row=parts_of_rows(rollouts, settings),
        )
        ahead = self._of.setdefault(state.policy, PartsAhead())
        ahead.graphs = ahead.graphs or self._graphs() or GraphMemory(networks, settings)
        with networks.own_adapter():
            for part, cut in micros.parts().items():
                # A group can come again, with other tokens; those of before are of no use then.
                if (known := ahead.parts.pop(part, None)) is None or not _fits(known, plan, cut):
                    (passes,) = run_passes(
                        plan, [cut], networks, settings, ahead.graphs, early=True
                    )
                    known = _Part(plan, cut, passes)
                ahead.parts[part] = known

    def _graphs(self) -> GraphMemory | None:
        """Policies share one device: the graphs of all wait in the same memory."""
        return next((one.graphs for one in self._of.values() if one.graphs is not None), None)


def parts_of_rows(rollouts: RolloutBatch, settings: LearnerSettings) -> Array:
    """int64 [B]: the part of its step that each row belongs to (`learner.stream_parts`)."""
    size, parts = settings.batch.prompts_per_step, settings.learner.stream_parts
    return np.array([part_of(group, size, parts) for group in rollouts.group_ids.tolist()])


def passes_of(
    plan: PassPlan,
    parts: Mapping[int, Sequence[Microbatch]],
    ahead: PartsAhead,
    networks: Networks,
    settings: LearnerSettings,
) -> PartPasses:
    """Of all parts of the step that is under way, in order: those that were measured ahead, and
    the others now."""
    done = {part: ahead.take(part, plan, micros) for part, micros in parts.items()}
    left = [part for part, found in done.items() if found is None]
    wanted = [parts[part] for part in left]
    done |= zip(left, run_passes(plan, wanted, networks, settings, ahead.graphs), strict=True)
    return tuple(one for found in done.values() for one in found or ())


def _fits(known: _Part, plan: PassPlan, micros: Sequence[Microbatch]) -> bool:
    return (
        known.plan == plan
        and len(known.micros) == len(micros)
        and all(one.reads_the_same(other) for one, other in zip(known.micros, micros, strict=True))
    )
