"""The processes of one learner: where they run, what all of them are asked, and what is raised
when one of them fails."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.contracts.actor_names import Names
from cluster.contracts.deadlines import within
from cluster.contracts.errors import AccordError, Fatal, LearnerLost, PeerLost, Retryable
from learner.remote.actor import LearnerActors
from learner.settings import LearnerSettings

_GRACE_S = 5.0
"""After one process has failed: for the others to meet the same fault by themselves."""


class LearnerProcesses:
    """``actors``: none before ``begin`` and after ``end``. Errors of Accord arrive as they were
    raised; when one process fails and not the others, all are ended.

    cores: dealt out to them, `threads` to each; empty: they are not pinned. options: more options
    of the actors, such as a scheduling strategy.
    """

    def __init__(
        self, cores: Sequence[int], threads: int, options: dict[str, Any] | None, names: Names
    ) -> None:
        self._cores, self._threads = tuple(cores), threads
        self._options = dict(options or {})
        self._names = names
        self._group: Any = None  # reserves places near each other for several processes
        self.actors: list[Any] = []

    def begin(self, settings: LearnerSettings) -> None:
        """Ask Ray for as many as the settings say. They have their places once they answer."""
        self.actors = [
            LearnerActors.options(**options, **self._named(rank)).remote(
                settings, self._cores_of(rank), self._threads, rank
            )
            for rank, options in enumerate(self._places(settings))
        ]

    def _places(self, settings: LearnerSettings) -> list[dict[str, Any]]:
        """Options of each process. Several share one placement group, so that all of them get a
        place or none, on as few machines as possible."""
        learner = settings.learner
        common: dict[str, Any] = {"num_cpus": learner.cpus, "num_gpus": learner.gpus}
        common |= {"resources": dict(learner.resources), "max_restarts": 0, **self._options}
        labels = dict(learner.labels)
        if learner.processes == 1:
            return [common | ({"label_selector": labels} if labels else {})]
        asked = {"CPU": learner.cpus, "GPU": learner.gpus, **learner.resources}
        bundle = {kind: amount for kind, amount in asked.items() if amount > 0}
        self._group = placement_group(
            [bundle] * learner.processes,
            strategy="PACK",
            bundle_label_selector=[labels] * learner.processes if labels else None,
        )
        return [
            common | {"scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, rank)}
            for rank in range(learner.processes)
        ]

    def _named(self, rank: int) -> dict[str, str]:
        return self._names(f"learner-{rank}" if rank else "learner")

    def _cores_of(self, rank: int) -> tuple[int, ...]:
        own = self._cores[rank * self._threads : (rank + 1) * self._threads]
        return own or self._cores  # fewer cores than processes: they share them all

    def each(self, method: str) -> list[asyncio.Future[Any]]:
        """What each of them answers."""
        return [
            asyncio.wrap_future(getattr(actor, method).remote().future()) for actor in self.actors
        ]

    async def pulse(self) -> None:
        """Returns when every process has answered. Raises Retryable when one is gone."""
        if not self.actors:
            raise Retryable("the learner has no process yet")
        try:
            await asyncio.gather(*self.each("pulse"))
        except RayError as problem:
            raise Retryable(f"the learner does not answer: {problem}") from None

    async def lost(self) -> None:
        """Waits until one of them has ended without being asked to; raises LearnerLost."""
        ends = self.each("wait")
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            problem = done.pop().exception()
            raise LearnerLost(f"the learner's process died: {problem}")
        finally:
            for one in ends:
                one.cancel()

    async def first(self, method: str, limit_s: float, purpose: str, *args: Any) -> Any:
        """As `call`, of the first process alone."""
        if not self.actors:
            raise LearnerLost(f"the learner was asked to {method} but is not running")
        return (await self.ask(self.actors[:1], method, limit_s, purpose, *args))[0]

    async def call(
        self,
        method: str,
        limit_s: float,
        purpose: str,
        *args: Any,
        together: bool = True,
        task: str = "",
    ) -> Any:
        """What the first process answers, once all have: see `call_all`."""
        answers = await self.call_all(method, limit_s, purpose, *args, together=together, task=task)
        return answers[0]

    async def call_all(
        self,
        method: str,
        limit_s: float,
        purpose: str,
        *args: Any,
        together: bool = True,
        task: str = "",
    ) -> list[Any]:
        """What the processes answer.

        together: they work on it together, so that one that fails leaves the others waiting. task:
        its name in Ray's dashboard.
        """
        if not self.actors:
            raise LearnerLost(f"the learner was asked to {method} but is not running")
        return await self.ask(
            self.actors, method, limit_s, purpose, *args, together=together, task=task
        )

    async def ask(
        self,
        actors: list[Any],
        method: str,
        limit_s: float,
        purpose: str,
        *args: Any,
        together: bool = True,
        task: str = "",
    ) -> list[Any]:
        named = {"name": task} if task else {}
        answers = [
            asyncio.wrap_future(getattr(actor, method).options(**named).remote(*args).future())
            for actor in actors
        ]
        try:
            until = asyncio.FIRST_EXCEPTION if together else asyncio.ALL_COMPLETED
            done, waiting = await asyncio.wait(answers, timeout=limit_s, return_when=until)
            if waiting and together and any(answer.exception() for answer in done):
                done, waiting = await asyncio.wait(answers, timeout=_GRACE_S)
            problems = [p for answer in done if (p := answer.exception()) is not None]
            # What nobody raised on purpose may have left the weights half changed.
            unfit = any(isinstance(error_of(problem, method), LearnerLost) for problem in problems)
            if waiting or unfit or (together and 0 < len(problems) < len(answers)):
                self.end()
            if problems:
                raise error_of(_worst(problems), method) from None
            if waiting:
                raise LearnerLost(f"waited {limit_s:.0f} s for the learner {purpose}; it was ended")
            return [answer.result() for answer in answers]
        finally:
            for answer in answers:
                answer.cancel()

    async def ask_beside(self, method: str, limit_s: float, *args: Any, rank: int = 0) -> Any:
        """What one process answers, of what goes on beside the steps: one that takes too long is no
        reason to end the learner. Raises TimeoutError."""
        if not self.actors:
            raise Fatal(f"the learner was asked to {method} but is not running")
        answer = getattr(self.actors[rank], method).remote(*args)
        try:
            return await within(limit_s, asyncio.wrap_future(answer.future()))
        except TimeoutError:
            raise TimeoutError(f"the learner did not {method} within {limit_s:.0f} s") from None
        except RayError as problem:
            raise error_of(problem, method) from None

    def end(self) -> None:
        actors, self.actors = self.actors, []
        for actor in actors:
            ray.kill(actor, no_restart=True)
        if self._group is not None:
            group, self._group = self._group, None
            remove_placement_group(group)


def _worst(problems: Sequence[BaseException]) -> BaseException:
    """The one of several that says most: what a process could not do with the others (a plain
    fault of a collective among them) follows from what happened to one of those."""

    def rank(problem: BaseException) -> int:
        if isinstance(problem, RayTaskError):
            cause = problem.cause
            return 0 if isinstance(cause, AccordError) and not isinstance(cause, PeerLost) else 2
        return 1

    return min(problems, key=rank)


def error_of(problem: BaseException, method: str) -> BaseException:
    """What to raise for `problem`, which a process met that was asked to `method`."""
    if isinstance(problem, RayTaskError):
        return _original(problem, method)
    if isinstance(problem, RayActorError):
        return LearnerLost(f"the learner's process died while asked to {method}: {problem}")
    if isinstance(problem, RayError):
        return LearnerLost(f"Ray lost the learner's answer to {method}: {problem}")
    return problem


def _original(problem: RayTaskError, method: str) -> AccordError:
    """What the learner raised, not what Ray made of it."""
    if isinstance(problem.cause, AccordError):
        return problem.cause
    # Its text is the traceback; its other attributes are those of the cause.
    return LearnerLost(f"the learner failed in {method}:\n{problem}")
