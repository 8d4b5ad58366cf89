"""What is known of a training run before any of its roles starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.assembly.catch_up import NOTHING_SINCE, Since
from cluster.assembly.prepare import Prepared
from cluster.assembly.run_session import RunSession
from cluster.contracts.callbacks import AnyCallback
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.records import RunState
from cluster.machine.cores import CorePlan
from cluster.runs.checkpoints import Found

READING = "model, prompts and rewards"
"""Name of the part of a start in which they are read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One run of the loop: what was checked, the run directory, and where each role computes."""

    prepared: Prepared
    session: RunSession
    cores: CorePlan
    resumed: Found | None = None
    since: Since = NOTHING_SINCE  # steps after the checkpoint, to be trained again from disk
    callbacks: Sequence[AnyCallback] = ()

    @property
    def config(self) -> TrainConfig:
        return self.prepared.config

    @property
    def first_step(self) -> int:
        return self.state.step if self.state else 0

    @property
    def state(self) -> RunState | None:
        """Where the run goes on; None: at its start."""
        if self.resumed is None and not self.since.steps:
            return None
        begun = self.resumed.state if self.resumed else start_of(len(self.prepared.prompts))
        return self.since.advance(begun, self.config.batch.prompts_per_step)


def start_of(prompts: int) -> RunState:
    """Of a run that has no checkpoint yet."""
    return RunState(step=0, version=0, next_group=0, prompts_total=prompts)
