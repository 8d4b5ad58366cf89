"""Notices within a minute that Ray's head is gone, before Ray ends the driver for it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from cluster.assembly.run_session import RunSession
from cluster.contracts.errors import Resumable
from cluster.loop.controller import Controller
from cluster.machine.event_loop import in_own_thread
from cluster.machine.head import head_address, head_answers
from cluster.machine.signals import TRY_AGAIN, end_command_after

LOOK_S = 5.0
DEADLINE_S = 5.0  # for one answer
MISSES = 3  # in a row: one or two are a head that is busy
LEAVE_S = 25.0  # by then the command has ended, whatever hangs: before Ray ends it
KEEP_S = 15.0  # for the learner to save; Ray ends this process a minute after its head is gone


class HeadLost(Resumable):
    """Ray's head does not answer any more. What was learnt so far is on disk."""


class HeadWatch:
    """Looks from a thread of its own: calls of Ray that the event loop makes may wait for the head.

    ``answers``: asks the head, which may raise or hang. When the head is lost, ``noticed`` is
    called at once, in that thread, and then ``lost`` in the event loop, once it is free.
    """

    def __init__(
        self,
        answers: Callable[[], bool],
        lost: Callable[[], None],
        event: Callable[..., None],
        look_s: float = LOOK_S,
        deadline_s: float = DEADLINE_S,
        noticed: Callable[[], None] = lambda: None,
    ) -> None:
        self._ask = answers
        self._lost, self._noticed = lost, noticed
        self._event = event
        self._look_s, self._deadline_s = look_s, deadline_s
        self._over = threading.Event()

    async def run(self) -> None:
        """Returns when the head is lost."""
        try:
            if await in_own_thread(self._watch):
                self._lost()
        finally:
            self._over.set()

    async def is_lost(self) -> bool:
        return await in_own_thread(self._is_lost)

    def _watch(self) -> bool:
        while not self._over.wait(self._look_s):
            if self._is_lost():
                self._event("head_lost", unanswered=MISSES)
                self._noticed()
                return True
        return False

    def _is_lost(self) -> bool:
        for attempt in range(MISSES):
            if attempt:
                time.sleep(self._look_s / MISSES)
            if self._answers():
                return False
        return True

    def _answers(self) -> bool:
        answers: queue.SimpleQueue[bool] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put(self._ask())
            except Exception:  # whatever the call meets, it is no answer
                answers.put(False)

        threading.Thread(target=ask, name="accord-asks-head", daemon=True).start()
        try:
            return answers.get(timeout=self._deadline_s)
        except queue.Empty:
            return False


def watch_head(session: RunSession, controller: Controller) -> HeadWatch:
    """Ends the run that ``controller`` drives when the head is lost."""
    place = head_address()
    return HeadWatch(
        lambda: head_answers(place, DEADLINE_S),
        lambda: controller.end(_head_lost(session), KEEP_S),
        session.event,
        noticed=lambda: _end_whatever_hangs(session),
    )


async def raise_if_head_lost(head: HeadWatch, session: RunSession, problem: Exception) -> None:
    """A lost head breaks much else, which may be noticed first. Raises HeadLost if that is why."""
    if not isinstance(problem, Resumable) and await head.is_lost():
        session.event("head_lost", unanswered=MISSES, noticed_as=str(problem))
        _end_whatever_hangs(session)
        raise _head_lost(session) from problem


def _end_whatever_hangs(session: RunSession) -> None:
    """Some of what Ray is asked for waits for the head."""
    end_command_after(LEAVE_S, f"stopped: {_head_lost(session)}", TRY_AGAIN)


def _head_lost(session: RunSession) -> HeadLost:
    return HeadLost(
        "the cluster's head is lost: Ray does not answer any more. Once it runs again, resume with "
        f"accord train --resume {session.path}"
    )
