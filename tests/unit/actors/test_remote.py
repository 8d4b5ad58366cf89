"""What Ray says of a lost worker, as one of our classes of errors. No Ray is started."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
)

from actors.remote import RayRolloutWorker, lost, original
from cluster.contracts.errors import (
    EngineFailure,
    MachineLost,
    Retryable,
    Unexpected,
    WorkerDied,
)

NODE_DIED = """The actor died unexpectedly before finishing this task.
\tclass_name: RolloutActor
\tactor_id: 1234
\tpid: 77
The actor died because its node has died. Node Id: abc
"""


PROCESS_DIED = NODE_DIED.replace(
    "its node has died. Node Id: abc",
    "its worker process has died. End of file. Some common causes include: (1) a (2) b",
)


def died(text: str, *, preempted: bool = False) -> RayActorError:
    return RayActorError("1234", text, preempted=preempted)


@pytest.mark.parametrize(
    ("problem", "kind", "words"),
    [
        (ActorDiedError(), WorkerDied, "died unexpectedly"),
        (ActorUnavailableError("gone for now", None), MachineLost, "gone for now"),
        (died(NODE_DIED), MachineLost, "its node has died"),
        (died(PROCESS_DIED), WorkerDied, "its worker process has died. End of file."),
        (died("taken back", preempted=True), MachineLost, "taken back"),
    ],
)
def test_a_lost_worker_is_told_from_a_lost_machine(
    problem: Exception, kind: type[Retryable], words: str
) -> None:
    found = lost(problem, "worker-3")
    assert type(found) is kind
    assert str(found).startswith("worker-3 is lost: ")
    assert words in str(found)
    assert "class_name" not in str(found)
    assert "common causes" not in str(found)


def test_an_actor_that_could_not_be_made_says_why() -> None:
    text = "The actor died because of an error raised in its creation\nTraceback\nKeyError: 'x'"
    found = lost(RayActorError("1234", text, actor_init_failed=True), "worker-3")
    assert type(found) is Unexpected
    assert str(found) == "worker-3 could not be made: KeyError: 'x'"


@pytest.mark.parametrize(
    ("cause", "kind", "words"),
    [
        (EngineFailure("out of memory"), EngineFailure, "out of memory"),
        (KeyError("surprise"), Unexpected, "worker-3 failed: KeyError: 'surprise'"),
        (ObjectLostError("ab", None, ""), Retryable, "worker-3 lost what it needed"),
    ],
)
def test_what_a_worker_raised_keeps_its_class_or_gets_one(
    cause: Exception, kind: type[Exception], words: str
) -> None:
    problem = RayTaskError("harvest", "a trace", cause)
    found = original(problem, "worker-3")
    assert type(found) is kind
    assert words in str(found)


class Call:
    """A method of an actor, and what a call of it returns."""

    def __init__(self, problem: BaseException | None) -> None:
        self._problem = problem

    def remote(self, *given: Any) -> Call:
        return self

    def future(self) -> Future[None]:
        future: Future[None] = Future()
        if self._problem is None:
            future.set_result(None)
        else:
            future.set_exception(self._problem)
        return future


class Actor:
    def __init__(self, submit: BaseException, placed: BaseException | None) -> None:
        self.submit, self.placed = Call(submit), Call(placed)


@pytest.mark.parametrize(
    ("then", "kind", "words"),
    [
        (died(PROCESS_DIED), WorkerDied, "its worker process has died"),
        (died(NODE_DIED), MachineLost, "its node has died"),
        (ActorUnavailableError("still away", None), MachineLost, "gone for now"),
        (None, MachineLost, "gone for now"),
    ],
)
def test_an_actor_that_cannot_be_reached_is_asked_once_more_what_became_of_it(
    then: BaseException | None, kind: type[Retryable], words: str
) -> None:
    """A killed process must be told from a host that is about to be lost: only the first may be
    charged with it, or make suspects of its prompts."""
    worker = object.__new__(RayRolloutWorker)
    worker.name, worker._call_s = "worker-3", 30.0
    worker._actor = Actor(ActorUnavailableError("gone for now", None), then)
    with pytest.raises(Retryable, match=words) as found:
        asyncio.run(worker.submit([]))
    assert type(found.value) is kind
