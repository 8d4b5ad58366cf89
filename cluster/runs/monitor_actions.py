"""What monitors do to a run: raise the KL coefficient, pause it, stop it, go back to a checkpoint.

Pause and stop are asked for as a person asks for them (`cluster.runs.control`). The controller
takes the other two from here, between two learner steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.contracts.config.monitors import Action, MonitorsConfig
from cluster.runs.checkpoints import Checkpoints, step_of
from cluster.runs.control import ask
from cluster.runs.evaluations import best_of
from cluster.runs.monitors import AlarmChange

STRENGTH: Sequence[Action] = ("raise_kl", "pause", "rollback", "stop")
COEFFICIENT = "objective/kl_coef"


@dataclass(frozen=True, slots=True)
class GoBack:
    """The run is to go on from a ``checkpoint``, with this KL coefficient. ``alarm``: why."""

    alarm: str
    checkpoint: Path
    kl_coef: float


@dataclass(slots=True)
class MonitorActions:
    """``kl_coef``: with which the next step is to be trained; None: as it is. ``go_back``: what is
    to be done before it. ``result``: the checkpoint whose policy a stop leaves as ``policy/``."""

    config: MonitorsConfig
    run_dir: Path
    steps: int = 0  # of the run
    rollbacks: int = 0  # that the run has done
    coefficient: float = 0.0  # of KL, in force
    kl_coef: float | None = None
    go_back: GoBack | None = None
    result: Path | None = None
    _checkpoints: Checkpoints = field(init=False)

    def __post_init__(self) -> None:
        self._checkpoints = Checkpoints(self.run_dir / "checkpoints", lambda kind, **detail: None)

    def act(self, changes: Sequence[AlarmChange], numbers: Mapping[str, float]) -> dict[str, str]:
        """Do what the alarms of a step ask for: of several actions the strongest. Returns what was
        done, as a sentence, by alarm."""
        self.coefficient = numbers.get(COEFFICIENT, self.coefficient)
        acting = [change for change in changes if change.action in STRENGTH]
        if not acting:
            return {}
        strongest = max(acting, key=lambda change: STRENGTH.index(change.action))
        return {strongest.alarm: self._do(strongest)}

    def act_once_more(self, changes: Sequence[AlarmChange], numbers: Mapping[str, float]) -> None:
        """On a resume: what the last step before it asked of the next one, which was not trained.
        A pause and a stop are over, because a person has resumed the run."""
        again = [change for change in changes if change.action in ("raise_kl", "rollback")]
        self.act(again, numbers)

    def next_step_trained(self) -> None:
        """The coefficient that was wanted is in force."""
        self.kl_coef = None

    def gone_back(self, coefficient: float) -> None:
        self.rollbacks += 1
        self.coefficient, self.kl_coef, self.go_back = coefficient, None, None

    def _do(self, change: AlarmChange) -> str:
        if change.action == "raise_kl":
            return self._raise_kl()
        if change.action == "pause":
            ask(self.run_dir, paused=True)
            return f"The run is paused; `accord resume {self.run_dir}` lets it go on."
        if change.action == "rollback":
            return self._go_back(change)
        return self._stop(change)

    def _raise_kl(self) -> str:
        before, after = self.coefficient, self.config.raised_kl(self.coefficient)
        if after == before:
            return f"The KL coefficient stays {before:.4g}: it is at monitors.kl_most."
        self.kl_coef = after
        return f"The KL coefficient is raised from {before:.4g} to {after:.4g}."

    def _go_back(self, change: AlarmChange) -> str:
        target = self._earlier(change)
        if change.step >= self.steps:
            return f"All steps are done. {self._stop(change)}"
        if self.rollbacks >= self.config.max_rollbacks:
            return f"It has gone back {self.rollbacks} times already. {self._stop(change)}"
        if target is None:
            return f"There is no checkpoint to go back to. {self._stop(change)}"
        raised = self.config.raised_kl(self.coefficient)
        self.go_back = GoBack(change.alarm, target, raised)
        return (
            f"The run goes back to {target.name}, with a KL coefficient of {raised:.4g} "
            f"(before: {self.coefficient:.4g})."
        )

    def _stop(self, change: AlarmChange) -> str:
        self.result = self._earlier(change)
        ask(self.run_dir, stop=True)
        if self.result is None:
            return "The run stops; no earlier checkpoint is there, so policy/ is its newest policy."
        return f"The run stops; policy/ is that of {self.result.name}."

    def _earlier(self, change: AlarmChange) -> Path | None:
        """The best checkpoint; without evaluations, the newest from before the alarm's cause."""
        complete = self._checkpoints.complete()
        best = best_of(self.run_dir)
        if best is not None and (named := self.run_dir / best.checkpoint) in complete:
            return named
        earlier = [path for path in complete if step_of(path.name) <= change.since]
        return earlier[-1] if earlier else None
