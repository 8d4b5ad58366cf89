"""The stages of a pipeline, on files in the run's directory, so that each can be repeated by hand.

Those that compute are in ``trainings``, which is imported when the first of them begins.
"""

from __future__ import annotations

import shutil
import sys
from contextlib import ExitStack

from cluster.assembly.forked_roles import forked_roles
from cluster.assembly.preferences import open_store, take_snapshot
from cluster.contracts.config.pipeline import PipelineConfig
from cluster.contracts.config.preferences import PreferencesConfig
from cluster.contracts.errors import AccordError
from cluster.machine.imports import quick_imports
from cluster.machine.ray_session import ray_cluster
from cluster.pipeline.labels import RoundLabels
from cluster.pipeline.record import StageName
from cluster.pipeline.rounds import PROMOTED, STORE, Outcome, Round, Waiting
from cluster.runs.console import Reporter
from cluster.runs.run import Run
from reward_service.preferences.gates import HeldBack

HEAVY = "torch"  # a process that has imported it holds memory that only its end gives back


class Afresh(BaseException):
    """The pipeline goes on in a new process: this one holds what waiting for people need not
    hold. ``path``: of the run."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


class Work:
    """The real stages of one pipeline. ``close`` ends what stages that follow each other share:
    Ray, and the process that has imported vLLM and that their workers are forked from."""

    def __init__(self, config: PipelineConfig, run: Run, reporter: Reporter) -> None:
        self._config = config
        self._run = run
        self._reporter = reporter
        self._computed = False
        self._ray: ExitStack | None = None

    def close(self) -> None:
        if self._ray is not None:
            self._ray.close()
            self._ray = None

    def do(self, name: StageName, at: Round, waiting: Waiting) -> Outcome:
        if name == "label":
            return self._label(at, waiting)
        if name == "gate":
            return self._gate(at)
        if name == "promote":
            return self._promote(at)
        with quick_imports():
            from cluster.pipeline.trainings import Trainings

        self._computed = True
        trainings = Trainings(self._config, self._run.path, self._reporter)
        if self._uses_ray(name) and self._ray is None:
            self._ray = ExitStack()
            self._ray.enter_context(forked_roles(self._config.cluster))
            self._ray.enter_context(ray_cluster(trainings.cluster(at)))
        return trainings.do(name, at)

    def _uses_ray(self, name: StageName) -> bool:
        if name == "policy":
            return self._config.policy_stage != "dpo"
        return name in ("sample", "evaluate")

    def _label(self, at: Round, waiting: Waiting) -> Outcome:
        """Who waits for people holds no Ray and no model. Raises Afresh."""
        people = self._config.label.by == "people"
        if people:
            self.close()
        labels = RoundLabels(self._config, at, self._run.path / STORE, self._reporter)
        self._computed |= labels.add_items()
        if people and self._computed and labels.open() and HEAVY in sys.modules:
            raise Afresh(str(self._run.path))
        return Outcome(came_from=(at.path("completions"),), detail=labels.collect(waiting))

    def _gate(self, at: Round) -> Outcome:
        """The quality gates, and a snapshot of all that was labelled so far."""
        folder = at.path("labels")
        shutil.rmtree(folder, ignore_errors=True)
        store = open_store(self._run.path / STORE, must_exist=True)
        config = PreferencesConfig(snapshot=self._config.snapshot, quality=self._config.quality)
        try:
            snapshot = take_snapshot(store, folder, config)
        except HeldBack as problem:
            raise AccordError(f"{problem}\n  {self._more_labels()}") from None
        detail = {"sha256": snapshot.sha256, **{n: c for n, c in snapshot.counts.items() if c}}
        return Outcome(
            made=(folder,), came_from=(at.path("completions"), store.path), detail=detail
        )

    def _more_labels(self) -> str:
        run, store = self._run.path, self._run.path / STORE
        return (
            f"fix: ask for more pairs: accord resume {run} choice.count=NUMBER; or judge them "
            f"again: accord label {store}, then accord resume {run}"
        )

    def _promote(self, at: Round) -> Outcome:
        promoted, reason = verdict(self._config, at)
        self._reporter.say(f"round {at.number}: {reason}")
        target = self._run.path / "policy"
        if promoted:
            from cluster.assembly.training_run import publish_policy

            publish_policy(at.policy, target)
        evaluated = (at.path("evaluation"),) if self._config.evaluate is not None else ()
        return Outcome(
            made=(target,) if promoted else (),
            came_from=(at.path("policy"), *evaluated),
            detail={PROMOTED: promoted, "reason": reason},
        )


def verdict(config: PipelineConfig, at: Round) -> tuple[bool, str]:
    """Whether the round's policy is promoted, and why."""
    if config.evaluate is None:
        return True, "promoted, as there is no [evaluate]"
    found = at.record.find(at.number, "evaluate")
    assert found is not None  # the stage before this one
    rate = found.detail["against_before"]
    shown = (
        f"win rate {rate['win_rate']:.1%} against the policy before the round "
        f"(95 % interval {rate['ci_low']:.1%} to {rate['ci_high']:.1%})"
    )
    least = config.promote.min_win_rate
    if least == 0:
        return True, f"promoted, as every round is; {shown}"
    promoted = rate["ci_low"] > least
    return promoted, (
        f"{'promoted' if promoted else 'not promoted'}; {shown}; the lower end must exceed "
        f"{least:.0%} (promote.min_win_rate)"
    )
