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
        """Where the run goes on."""
        if self.resumed is None:
            return None
        return self.since.advance(self.resumed.state, self.config.batch.prompts_per_step)
