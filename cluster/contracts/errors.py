"""The few exception types that cross a boundary between parts of Accord.

Ray and gRPC destroy exception types on the way, so a part raises one of these on the side where the
cause is known. ``launch.main`` turns a ``UserError`` into one message and exit code 2.

Each type has a ``fault``: what has failed. A run counts its faults apart by it (``faults/...``).
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

Fault = Literal["engine", "worker", "prompt", "reward", "learner", "fatal"]
"""engine: it raised, hung or holds other weights, and its worker is replaced; or it did
not finish a completion in time. worker: its process or
machine is gone or does not answer; it is replaced. prompt: one that cannot be completed; its group
is dropped. reward: a score that could not be had or used. learner: its process is gone. fatal: the
run must stop."""
FAULTS: tuple[Fault, ...] = get_args(Fault)


class AccordError(Exception):
    """Base of every error Accord raises on purpose."""

    fault: ClassVar[Fault] = "fatal"


class UserError(AccordError):
    """Something the user gave is wrong: what is wrong, where (file and key or row), what to do."""

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what, where, fix)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  fix: {self.fix}" if self.fix else text

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_user_error, (type(self), self.what, self.where, self.fix))


def _rebuild_user_error(kind: type[UserError], what: str, where: str, fix: str) -> UserError:
    return kind(what, where=where, fix=fix)


class Retryable(AccordError):
    """The work may succeed elsewhere or later: a worker died, a service did not answer in time."""

    fault: ClassVar[Fault] = "worker"


class WorkerDied(Retryable):
    """A worker's process has ended though nobody stopped it."""


class MachineLost(Retryable):
    """A worker's machine was taken back, is gone or cannot be reached. The worker is not charged
    with it, and no prompt is suspected."""


class Unexpected(Retryable):
    """A worker raised what nobody foresaw. It is replaced; a run bears only few of these."""


class EngineFailure(Retryable):
    """An engine could not be built, raised, hung or computed NaN. Another engine may do better."""

    fault = "engine"


class Late(EngineFailure):
    """A completion was not finished in time. It was aborted; the engine goes on with others."""


class Resumable(AccordError):
    """The run ends for a reason outside of it, with what it has learnt on disk. The same command
    with `--resume` may succeed once that is mended; `launch.main` exits with code 75."""


class NotSaved(AccordError):
    """A checkpoint could not be written (disk full). Training may go on; the next may succeed."""


class Fatal(AccordError):
    """The run must stop now; continuing would train on something wrong."""


class WeightMismatch(Fatal):
    """An engine does not compute with the weights the learner published."""

    fault = "engine"


class LearnerLost(Fatal):
    """The learner's process died or did not answer in time, or its weights may be half changed.
    Another one can take over from what is on disk."""

    fault = "learner"


class PeerLost(LearnerLost):
    """Another process of the learner has ended or did not come in time; what happened, it knows."""


class RolledBack(AccordError):
    """What was learnt since the newest checkpoint cannot be had again; the run goes on from there.
    Nothing that was sampled since may be trained on: its versions are given to other weights."""


class WeightsAway(Retryable):
    """The learner that published the weights is gone; another one publishes them anew."""

    fault = "learner"


class WorkersGone(Resumable):
    """Too few workers serve, and no more can come. What was learnt is sound and saved."""

    fault: ClassVar[Fault] = "worker"


class RewardsAway(Resumable):
    """Scores could not be had for longer than `reward.outage_s`."""

    fault: ClassVar[Fault] = "reward"


class RewardFailure(Retryable):
    """A score could not be had (service down, deadline passed). Never becomes a score of 0."""

    fault = "reward"


class BadReward(Fatal):
    """A scorer answered something unusable: not finite, wrong count, another model than agreed."""

    fault = "reward"


class Unrated(BadReward):
    """A scorer has no score for one completion, such as a judge whose answers about it hold no
    rating. In training only its group is left out; too many of them end the run."""
