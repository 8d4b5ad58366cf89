"""The few exception types that cross a boundary between parts of Accord.

Ray and gRPC destroy exception types on the way, so a part raises one of these on the side where the
cause is known. ``launch.main`` turns a ``UserError`` into one message and exit code 2.
"""

from __future__ import annotations


class AccordError(Exception):
    """Base of every error Accord raises on purpose."""


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


class Resumable(AccordError):
    """The run ends for a reason outside of it, with what it has learnt on disk. The same command
    with `--resume` may succeed once that is mended; `launch.main` exits with code 75."""


class Fatal(AccordError):
    """The run must stop now; continuing would train on something wrong."""


class PeerLost(Fatal):
    """Another process of the learner has ended or did not come in time; what happened, it knows."""


class WeightMismatch(Fatal):
    """An engine does not compute with the weights the learner published."""


class RewardFailure(Retryable):
    """A score could not be had (service down, deadline passed). Never becomes a score of 0."""


class BadReward(Fatal):
    """A scorer answered something unusable: not finite, wrong count, another model than agreed."""
