"""What happens when the learner is lost: pure decisions, applied by the controller.

Another learner starts from the newest checkpoint and trains again, from disk, the steps that were
saved since. What it cannot have from there is kept here: the batches of the newest three steps (the
one under way, and those before it whose rollouts may not have reached the run directory yet).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.contracts.errors import LearnerLost, RolledBack
from cluster.contracts.records import StepInput, WeightManifest
from cluster.loop.supervision import GiveUp, Loss, decide


@dataclass(slots=True)
class Succession:
    """``redo``: steps that a new learner has to do before anything else, oldest first."""

    max_restarts: int
    losses: list[Loss] = field(default_factory=list)
    newest: WeightManifest | None = None  # of the versions published
    redo: list[StepInput] = field(default_factory=list)
    _asked: dict[int, StepInput] = field(default_factory=dict)

    def asked(self, batch: StepInput) -> None:
        """A learner was asked for this step."""
        self._asked = {n: kept for n, kept in self._asked.items() if n >= batch.step - 2}
        self._asked[batch.step] = batch

    def given_back(self, step: int) -> None:
        """The step's rollouts are lost: it will be asked for with others."""
        self._asked.pop(step, None)
        self.redo = [batch for batch in self.redo if batch.step != step]

    def published(self, manifest: WeightManifest) -> None:
        """Raises RolledBack when a version is published again with other weights: tokens that were
        sampled from the first would be taken for its."""
        if (
            self.newest is not None
            and manifest.version == self.newest.version
            and manifest.tensors != self.newest.tensors
        ):
            raise RolledBack(f"version {manifest.version}, trained again, has other weights")
        if self.newest is None or manifest.version >= self.newest.version:
            self.newest = manifest

    def lost(self, problem: LearnerLost, now: float) -> float:
        """Seconds to wait before another learner is started. Raises what ends the run when they
        are lost too often."""
        self.losses.append(Loss(now))
        decision = decide(self.losses, now, max_restarts=self.max_restarts)
        if isinstance(decision, GiveUp):
            raise LearnerLost(
                f"the learner was {decision.reason} (learner.max_restarts = {self.max_restarts}); "
                f"resume the run once the cause is mended. The last one: {problem}"
            ) from problem
        return decision.after_s

    def succeeded(self, manifest: WeightManifest, step: int) -> None:
        """Another learner stands at ``manifest``; the run has done ``step`` steps. Raises
        RolledBack where it cannot be brought there."""
        version = manifest.version
        missing = [n for n in range(version, step) if n not in self._asked]
        if missing or version > step:
            raise RolledBack(
                f"the rollouts of step {missing[0]} are not on disk"
                if missing
                else f"the rollouts on disk reach version {version}, the run {step}"
            )
        self.redo = [self._asked[n] for n in sorted(self._asked) if n >= version]
        self.published(manifest)
