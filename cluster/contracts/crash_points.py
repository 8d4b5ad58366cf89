"""Named places at which a run can be told to end as if killed, to test what a resume finds.

    ACCORD_CRASH_AT=driver.before_commit:2 accord train …   # at the second passing of this place
    ACCORD_CRASH_AT=learner.mid_save@1 accord train …       # of the learner's process 1 alone

A point of the driver ends the command, one of the learner ends the processes of the run's first
learner. They end with exit code 137 and without any cleaning up, as `kill -9` would end them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.contracts.errors import UserError

VARIABLE = "ACCORD_CRASH_AT"
EXIT_CODE = 137  # what a shell says of a process that SIGKILL ended

DRIVER = "driver."
LEARNER = "learner."
POINTS = {
    "driver.after_admit": "groups were given to the workers",
    "driver.before_step": "the groups of a step are there; the learner was not asked yet",
    "driver.after_step": "the learner has answered; nothing of the step is written yet",
    "driver.after_metrics": "the ledger and the metrics of the step are written",
    "driver.after_broadcast": "every worker holds the step's weights",
    "driver.mid_save": "the checkpoint's files are in the staging folder",
    "driver.before_commit": "the run's state is there too; the manifest is not",
    "driver.after_manifest": "the manifest is there; the staging folder is not renamed yet",
    "driver.after_commit": "the checkpoint has its name; older ones are not deleted yet",
    "driver.mid_rollback": "the ledger has the step that a rollback gives up; its checkpoint is "
    "not written",
    "learner.after_optimizer_step": "the weights of a step have changed",
    "learner.before_publish": "the step has its new version, which nobody has got",
    "learner.mid_publish": "a part of the new version's weights is with the transport",
    "learner.mid_save": "the policy is in the staging folder; the optimizer is not",
}
"""Name -> what has happened when it is passed."""


@dataclass(slots=True)
class _Armed:
    name: str
    left: int  # passings until the end
    process: int | None  # of the learner's; None: all


_armed: _Armed | None = None


def passing(name: str) -> None:
    """To be called at the place ``name``. Does nothing in a run that was not told to end there."""
    if _armed is None or _armed.name != name:
        return
    _armed.left -= 1
    if _armed.left == 0:
        os.write(2, f"{VARIABLE}: ended at {name}\n".encode())
        _end(EXIT_CODE)


def arm(text: str | None) -> None:
    """Name the place, as ``name`` or ``name:n``; None or empty: nowhere. Raises UserError for a
    name that no place has."""
    global _armed
    _armed = _read(text) if text else None


def arm_from(environment: Mapping[str, str]) -> None:
    arm(environment.get(VARIABLE))


def take_learners() -> tuple[str, int | None] | None:
    """The place of the learner's that was named, and the number of its process (None: all), once: a
    learner that takes over from the one that ended there must not end there too."""
    global _armed
    if _armed is None or not _armed.name.startswith(LEARNER):
        return None
    taken, _armed = _armed, None
    return f"{taken.name}:{taken.left}", taken.process


def _read(text: str) -> _Armed:
    place, _, count = text.partition(":")
    name, at, process = place.partition("@")
    if name not in POINTS:
        names = "".join(f"\n       {point}" for point in POINTS)
        raise UserError(f"no crash point {name!r}", where=VARIABLE, fix=f"one of{names}")
    if count and not (count.isdecimal() and int(count) > 0):
        raise UserError(
            f"{count!r} is not a number of passings", where=VARIABLE, fix=f"for example {name}:2"
        )
    if at and not (process.isdecimal() and name.startswith(LEARNER)):
        raise UserError(
            f"{place!r} names no process of the learner",
            where=VARIABLE,
            fix=f"for example {LEARNER}mid_save@1",
        )
    return _Armed(name, int(count or 1), int(process) if at else None)


_end = os._exit
