"""A run that a monitor sends back: the real controller and run directory, fake roles."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.assembly.going_back import go_back, go_back_before_the_first_step
from cluster.contracts import crash_points
from cluster.contracts.config.monitors import MonitorsConfig
from cluster.contracts.durable import FileDigest, digests_below
from cluster.contracts.errors import NotSaved, Resumable
from cluster.contracts.records import RunState, StepInput, StepResult
from cluster.loop.activities import Activities
from cluster.loop.ending import Abandoned, GoesBack
from cluster.runs.audit import Audit, Rules, audit_steps
from cluster.runs.checkpoints import Checkpoints, verify_checkpoint
from cluster.runs.console import Reporter
from cluster.runs.monitor_actions import GoBack, MonitorActions
from cluster.runs.monitor_sink import MonitorSink
from cluster.runs.run import LEDGER, Run
from tests.unit.cluster.loop.test_controller import (
    FakeLearner,
    Lines,
    Prompts,
    World,
    build,
    drive,
    events,
)

STEPS, PER_STEP = 12, 3


class Learner(FakeLearner):
    """Its checkpoints hold what the driver has to change of them. A step begins only when the
    checkpoint of before is written, so that there is one of each even step."""

    activities: Activities

    async def step(self, batch: StepInput) -> StepResult:
        while "save" in self.activities:
            await asyncio.sleep(0.001)
        return await super().step(batch)

    async def store(self, directory: str) -> tuple[FileDigest, ...]:
        await super().store(directory)
        kl = {"controller": "FixedKL", "fixed_coef": 0.05}
        trainer = Path(directory) / "trainer.json"
        trainer.write_text(json.dumps({"version": self.copied, "kl": kl}))
        return digests_below(Path(directory))


class Gamed(Lines):
    """The sink that wants the run to go back when ``at`` steps are done."""

    def __init__(self, actions: MonitorActions, at: int, to: int) -> None:
        super().__init__()
        self._actions, self._at, self._to = actions, at, to

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        if step == self._at:
            place = self._actions.run_dir / "checkpoints" / f"step-{self._to:06d}"
            self._actions.go_back = GoBack("held-out-gap", place, 0.1)


class Job:
    """What `go_back` is given, and each loop until the run is through."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, Run(folder / "run")
        self.actions = MonitorActions(MonitorsConfig(), self.run.path, steps=STEPS)
        self.learners: list[Learner] = []

    def loop(self, state: Any, at: int, to: int, bound: int) -> Any:
        first = state.step if state else 0
        learner = Learner(version=first)
        self.learners.append(learner)
        controller, pool, _, _ = build(
            self.folder,
            World(),
            learner,
            steps=STEPS,
            bound=bound,
            state=state,
            monitors=self.actions,
            again=self.run if state else None,
            checkpoint_every=2,
            keep_checkpoints=9,
        )
        learner.activities = controller._activities
        controller._books._sinks._sinks.append(Gamed(self.actions, at, to))  # type: ignore[attr-defined]
        return asyncio.run(drive(controller, pool))

    def back(self, abandoned: Abandoned) -> Any:
        return go_back(*self.given(abandoned.state, abandoned))

    def back_on_a_resume(self, state: RunState) -> Any:
        training, _, actions, sink = self.given(state)
        return go_back_before_the_first_step(training, actions, sink)

    def given(self, state: RunState, abandoned: Any = None) -> Any:
        run = self.run
        session = SimpleNamespace(
            run=run, event=run.event, account=run.account, copy_to_mirror=lambda: None
        )
        config = SimpleNamespace(
            batch=SimpleNamespace(prompts_per_step=PER_STEP), checkpoint=SimpleNamespace(keep=9)
        )
        sink = MonitorSink(
            MonitorsConfig(), run, Reporter(quiet=True), self.actions, samples_per_prompt=2
        )
        prompts = SimpleNamespace(prompts=Prompts())
        training = _Training(session, config, prompts, state=state)
        return training, abandoned, self.actions, sink

    def audit(self) -> Audit:
        rules = Rules(prompts_per_step=PER_STEP, samples_per_prompt=2, bound=3, steps=STEPS)
        audit = Audit()
        lines = (self.run.path / LEDGER).read_text().splitlines()
        audit_steps([json.loads(line) for line in lines], rules, audit)
        return audit


class _Training:
    def __init__(self, session: Any, config: Any, prepared: Any, **later: Any) -> None:
        self.session, self.config, self.prepared = session, config, prepared
        self.__dict__.update(later)


@pytest.fixture(autouse=True)
def _replace(monkeypatch: pytest.MonkeyPatch) -> None:
    def replaced(given: Any, **changes: Any) -> Any:
        if isinstance(given, _Training):
            return _Training(given.session, given.config, given.prepared, **changes)
        return original(given, **changes)

    import cluster.assembly.going_back as module

    original = module.replace
    monkeypatch.setattr(module, "replace", replaced)


def sent_back(job: Job, *, at: int = 7, to: int = 4, bound: int = 2) -> Any:
    with pytest.raises(GoesBack) as wish:
        job.loop(None, at, to, bound)
    return job.back(wish.value.abandoned)


@pytest.mark.parametrize("bound", [0, 2])
def test_every_prompt_of_a_run_that_went_back_is_accounted_for(tmp_path: Path, bound: int) -> None:
    job = Job(tmp_path)
    state = sent_back(job, bound=bound).resumed.state
    assert (state.step, state.version, state.next_group) == (8, 8, 24)
    assert [row["group"] for row in state.dropped] == [21, 22, 23]
    (rollback,) = state.rollbacks
    assert (rollback["step"], rollback["to"], rollback["kl_coef"]) == (7, 4, 0.1)
    end = job.loop(state, 0, 0, bound)
    assert end.rollbacks == state.rollbacks
    trained = [group for learner in job.learners for b in learner.batches for group in b.group_ids]
    assert trained == [*range(21), *range(24, 36)]
    audit = job.audit()
    assert audit.violations == []
    assert (audit.trained, audit.dropped.total(), audit.in_flight) == (33, 3, 0)
    (told,) = [event for event in events(job.run) if event["kind"] == "gone_back"]
    assert (told["step"], told["checkpoint"], told["dropped"]) == (8, "step-000004", 3)


def test_the_new_checkpoint_is_the_old_one_under_a_new_version(tmp_path: Path) -> None:
    job = Job(tmp_path)
    found = sent_back(job).resumed
    assert found.path.name == "step-000008"
    assert verify_checkpoint(found.path) is None
    old = job.run.checkpoints.path_of(4)
    trainer = json.loads((found.path / "trainer.json").read_text())
    assert (trainer["version"], trainer["kl"]["fixed_coef"]) == (8, 0.1)
    weights = "policy/model.safetensors"
    assert (found.path / weights).read_bytes() == (old / weights).read_bytes()
    assert verify_checkpoint(old) is None  # it shares files with the new one
    shutil.rmtree(old)
    assert verify_checkpoint(found.path) is None


def test_a_run_can_go_back_twice_also_to_where_it_went_back_to(tmp_path: Path) -> None:
    job = Job(tmp_path)
    state = sent_back(job).resumed.state
    with pytest.raises(GoesBack) as wish:
        job.loop(state, 10, 8, 2)
    again = job.back(wish.value.abandoned).resumed.state
    assert [(row["step"], row["to"]) for row in again.rollbacks] == [(7, 4), (10, 8)]
    assert (again.step, job.actions.rollbacks) == (11, 2)
    job.loop(again, 0, 0, 2)
    assert job.audit().violations == []


def test_a_damaged_checkpoint_ends_the_run_and_a_resume_can_try_again(tmp_path: Path) -> None:
    job = Job(tmp_path)
    with pytest.raises(GoesBack) as wish:
        job.loop(None, 7, 4, 2)
    (job.run.checkpoints.path_of(4) / "policy" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(Resumable, match="cannot go back to step-000004, as held-out-gap asks"):
        job.back(wish.value.abandoned)
    assert job.run.checkpoints.newest_good().state.step == 6
    lines: Sequence[str] = (job.run.path / LEDGER).read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 6  # no line of a rollback that was none


def test_a_run_that_is_killed_in_the_middle_of_it_goes_back_on_the_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger has the line of the step, and the checkpoint was never written."""
    job = Job(tmp_path)
    with pytest.raises(GoesBack) as wish:
        job.loop(None, 7, 4, 2)
    with monkeypatch.context() as patch:
        patch.setattr(crash_points, "_end", lambda code: sys.exit(code))
        crash_points.arm("driver.mid_rollback")
        with pytest.raises(SystemExit):
            job.back(wish.value.abandoned)
        crash_points.arm(None)
    state = job.back_on_a_resume(wish.value.abandoned.state).resumed.state
    assert (state.step, len(state.rollbacks)) == (8, 1)
    job.loop(state, 0, 0, 2)
    audit = job.audit()
    assert audit.violations == []
    assert (audit.trained, audit.dropped.total(), audit.redone) == (33, 3, 1)
    assert job.actions.go_back is None
    assert job.back_on_a_resume(state).state is state  # nothing is asked for any more


def test_a_full_disk_ends_the_run_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path)
    with pytest.raises(GoesBack) as wish:
        job.loop(None, 7, 4, 2)

    def full(*_: Any) -> None:
        raise NotSaved("the disk is full")

    monkeypatch.setattr(Checkpoints, "begin", full)
    with pytest.raises(Resumable, match="cannot go back to step-000004: the disk is full"):
        job.back(wish.value.abandoned)
