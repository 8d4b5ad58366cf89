"""Notices within a minute that Ray's head is gone, before Ray ends the driver for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cluster.assembly.run_session import RunSession
from cluster.contracts.deadlines import within
from cluster.contracts.errors import Resumable
from cluster.loop.controller import Controller
from cluster.machine.event_loop import in_own_thread
from cluster.machine.head import head_address, head_answers
from cluster.machine.signals import TRY_AGAIN, end_command_after

LOOK_S = 5.0
DEADLINE_S = 5.0  # for one answer
MISSES = 3  # in a row: one or two are a head that is busy
LEAVE_S = 35.0  # by then the command has ended, whatever hangs
KEEP_S = 15.0  # for the learner to save; Ray ends this process a minute after its head is gone


class HeadLost(Resumable):
    """Ray's head does not answer any more. What was learnt so far is on disk."""


class HeadWatch:
    """``answers``: asks the head, which may raise or hang. ``lost`` is called once."""

    def __init__(
        self,
        answers: Callable[[], bool],
        lost: Callable[[], None],
        event: Callable[..., None],
        look_s: float = LOOK_S,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._ask = answers
        self._lost = lost
        self._event = event
        self._look_s, self._deadline_s = look_s, deadline_s

    async def run(self) -> None:
        """Returns when the head is lost."""
        while True:
            await asyncio.sleep(self._look_s)
            if await self.is_lost():
                self._event("head_lost", unanswered=MISSES)
                self._lost()
                return

    async def is_lost(self) -> bool:
        for attempt in range(MISSES):
            if attempt:
                await asyncio.sleep(self._look_s / MISSES)
            if await self._answers():
                return False
        return True

    async def _answers(self) -> bool:
        try:
            return await within(self._deadline_s, in_own_thread(self._ask))
        except Exception:  # whatever the call meets, it is no answer
            return False


def watch_head(session: RunSession, controller: Controller) -> HeadWatch:
    """Ends the run that ``controller`` drives when the head is lost."""
    place = head_address()
    return HeadWatch(
        lambda: head_answers(place, DEADLINE_S),
        lambda: controller.end(_head_lost(session), KEEP_S),
        session.event,
    )


async def raise_if_head_lost(head: HeadWatch, session: RunSession, problem: Exception) -> None:
    """A lost head breaks much else, which may be noticed first. Raises HeadLost if that is why."""
    if not isinstance(problem, Resumable) and await head.is_lost():
        session.event("head_lost", unanswered=MISSES, noticed_as=str(problem))
        raise _head_lost(session) from problem


def _head_lost(session: RunSession) -> HeadLost:
    problem = HeadLost(
        "the cluster's head is lost: Ray does not answer any more. Once it runs again, resume with "
        f"accord train --resume {session.path}"
    )
    # Some of what Ray is asked to end waits for the head.
    end_command_after(LEAVE_S, f"stopped: {problem}", TRY_AGAIN)
    return problem
