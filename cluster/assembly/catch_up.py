"""Which steps a learner can train again from disk, to stand where the run stood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.assembly.recorded_steps import recorded
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import AccordError
from cluster.contracts.records import RunState
from cluster.runs.audit import WHOLE_LEDGER
from cluster.runs.rows import Follower
from cluster.runs.run import LEDGER, Run

if TYPE_CHECKING:
    from learner.rl.step_record import RecordedStep

UNKNOWN = "left out before the run was resumed; events.jsonl has the cause"


@dataclass(frozen=True, slots=True)
class Since:
    """Steps since a checkpoint (or the start); their rollouts are whole and follow each other."""

    steps: Sequence[RecordedStep]

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(str(step.path.absolute()) for step in self.steps)

    def advance(self, state: RunState, prompts_per_step: int) -> RunState:
        """The run's state after these steps."""
        known = {int(row["group"]) for row in state.dropped}
        dropped: list[Any] = list(state.dropped)
        for step in self.steps:
            number = step.record.step
            groups = range(number * prompts_per_step, (number + 1) * prompts_per_step)
            gone = set(groups) - set(step.group_ids) - known
            dropped += [{"group": group, "prompt": "", "cause": UNKNOWN} for group in sorted(gone)]
        done = state.step + len(self.steps)
        return replace(
            state,
            step=done,
            version=done,
            next_group=done * prompts_per_step,
            dropped=tuple(dropped),
        )


NOTHING_SINCE = Since(())


def steps_since(run: Run, config: TrainConfig, step: int, until: int | None = None) -> Since:
    """The steps from ``step`` on, before ``until``, up to the first whose file is missing, damaged,
    made with other settings, or not a continuation of the one before."""
    from learner.rl.step_record import settings_digest
    from learner.settings import learner_settings

    expected = settings_digest(learner_settings(config, canary_prompt=(0,), run_dir=None))
    found: list[RecordedStep] = []
    for number in range(step, config.batch.steps if until is None else until):
        path = rollouts_file(run, number)
        try:
            next_step = recorded(path, number) if path.is_file() else None
        except AccordError as problem:
            run.event("rollouts_unusable", step=number, cause=str(problem))
            break
        if next_step is None or next_step.record.settings != expected:
            break
        if found and found[-1].record.after != next_step.record.before:
            break
        found.append(next_step)
    return Since(tuple(found))


def steps_entered(run: Run) -> int | None:
    """One more than the last step in the ledger; None without one.

    What the learner did beyond, the driver had not heard of when it was killed. It is done again,
    or no line would ever tell of it.
    """
    rows = Follower(run.path / LEDGER, WHOLE_LEDGER).new_rows()
    if not rows:
        return None
    last = rows[-1]
    return int(last["start"] if "start" in last else last["step"] + 1)


def rollouts_file(run: Run, step: int) -> Path:
    return run.path / "rollouts" / f"step-{step:06d}.parquet"


def forget_since(run: Run, step: int) -> int:
    """Remove the rollouts of the steps from ``step`` on, which will be generated anew; how many."""
    numbers = (int(p.stem.partition("-")[2]) for p in run.path.glob("rollouts/step-*.parquet"))
    later = [number for number in numbers if number >= step]
    for number in later:
        rollouts_file(run, number).unlink()
    return len(later)
