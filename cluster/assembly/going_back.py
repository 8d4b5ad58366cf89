"""A run goes back to an earlier checkpoint because a monitor says so, and trains on from there.

One step is given up for it. The checkpoint after that step holds the weights and the optimizer of
the earlier one, under a new version and with a higher KL coefficient. From then on it is a
checkpoint like any other, so a lost learner, a resume and another rollback need to know nothing of
it: the roles of the run start anew from it, and what older versions have sampled is gone with them.

The step's line in the ledger is written first, then the checkpoint, which makes the rollback count.
A run that is killed between the two does the step again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from cluster.assembly.catch_up import NOTHING_SINCE
from cluster.assembly.training_record import Training
from cluster.contracts.crash_points import passing
from cluster.contracts.durable import FileDigest, digest_of
from cluster.contracts.errors import NotSaved, Resumable
from cluster.contracts.records import RunState
from cluster.loop.ending import Abandoned
from cluster.runs.checkpoints import MANIFEST, RUN_STATE, step_of, verify_checkpoint
from cluster.runs.monitor_actions import GoBack, MonitorActions
from cluster.runs.monitor_sink import MonitorSink
from learner.trainer_file import TRAINER, moved_on


def go_back(
    training: Training, abandoned: Abandoned, actions: MonitorActions, sink: MonitorSink
) -> Training:
    """The training that goes on from the checkpoint that a monitor has chosen. Raises Resumable
    where the checkpoint is damaged or the new one cannot be written."""
    wanted, session = actions.go_back, training.session
    assert wanted is not None
    state = _state_after(training, abandoned.state, wanted)
    if problem := verify_checkpoint(wanted.checkpoint):
        raise Resumable(
            f"the run cannot go back to {wanted.checkpoint.name}, as {wanted.alarm} asks: {problem}"
        )
    lost = state.dropped[len(abandoned.state.dropped) :]
    session.account(
        step=abandoned.state.step,
        trained=[],
        dropped={str(row["group"]): row["cause"] for row in lost},
        samples=0,
        tokens=0,
        version_min=abandoned.state.step,
        version_max=abandoned.state.step,
        # Of the groups of later steps nothing is left; their prompts will be given out again.
        issued=state.next_group,
        ready=0,
        in_flight=0,
        refused=abandoned.refused,
    )
    passing("driver.mid_rollback")
    _write_checkpoint(training, wanted, state)
    session.event(
        "gone_back",
        step=state.step,
        checkpoint=wanted.checkpoint.name,
        alarm=wanted.alarm,
        kl_coef=wanted.kl_coef,
        dropped=len(lost),
        sampled_in_vain=max(0, abandoned.admitted - abandoned.state.next_group),
        rollback=len(state.rollbacks),
    )
    actions.gone_back(wanted.kl_coef)
    sink.gone_back(state.step)
    resumed = session.run.checkpoints.newest_good()
    return replace(training, resumed=resumed, since=NOTHING_SINCE)


def go_back_before_the_first_step(
    training: Training, actions: MonitorActions, sink: MonitorSink
) -> Training:
    """Where the run was killed between an alarm and the rollback that it asks for: now."""
    state = training.state
    if actions.go_back is None or state is None:
        return training
    # A session of its own: a line that the killed one wrote of this step does not count.
    training.session.account(start=state.step)
    abandoned = Abandoned(state=state, admitted=state.next_group, refused=0)
    return go_back(training, abandoned, actions, sink)


def _state_after(training: Training, state: RunState, wanted: GoBack) -> RunState:
    """Of the run once the step is given up, in which none of its groups is trained on."""
    batch, prompts, step = training.config.batch, training.prepared.prompts, state.step
    cause = f"rolled back to {wanted.checkpoint.name}"
    known = {int(row["group"]) for row in state.dropped}
    groups = range(step * batch.prompts_per_step, (step + 1) * batch.prompts_per_step)
    rows = [
        {"group": group, "prompt": prompts.prompt(group).id, "cause": cause}
        for group in groups
        if group not in known
    ]
    row = {"step": step, "to": step_of(wanted.checkpoint.name), "alarm": wanted.alarm}
    return replace(
        state,
        step=step + 1,
        version=step + 1,
        next_group=groups.stop,
        dropped=(*state.dropped, *rows),
        rollbacks=(*state.rollbacks, {**row, "kl_coef": wanted.kl_coef}),
    )


def _write_checkpoint(training: Training, wanted: GoBack, state: RunState) -> None:
    checkpoints, source = training.session.run.checkpoints, wanted.checkpoint
    try:
        staging = checkpoints.begin(state.step)
        files = _linked(source, staging)
        moved_on(source / TRAINER, staging / TRAINER, version=state.version, kl_coef=wanted.kl_coef)
        listed = [*files, digest_of(staging / TRAINER, TRAINER)]
        checkpoints.commit(staging, listed, state, training.config.checkpoint.keep)
    except (OSError, NotSaved) as problem:
        raise Resumable(f"the run cannot go back to {source.name}: {problem}") from problem
    training.session.copy_to_mirror()


def _linked(source: Path, staging: Path) -> list[FileDigest]:
    """The files that both checkpoints share. They are never written to again, so links will do."""
    entries = json.loads((source / MANIFEST).read_text(encoding="utf-8"))["files"]
    shared = {name: entry for name, entry in entries.items() if name not in (TRAINER, RUN_STATE)}
    _make_folders(staging, shared)
    for name in shared:
        try:
            os.link(source / name, staging / name)
        except OSError:  # a file system without them
            shutil.copy2(source / name, staging / name)
    return [FileDigest(name, entry["bytes"], entry["sha256"]) for name, entry in shared.items()]


def _make_folders(staging: Path, names: Iterable[str]) -> None:
    for name in names:
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
