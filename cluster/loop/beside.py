"""Completions that workers write beside those for training: no group, no lease, no staleness.

The prompts are shared out in parts, one part at a time to each worker. What a worker does not
answer, because it is lost or late, is asked of another one. An answer that comes after that counts
no more, as nobody waits for it.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.contracts.errors import AccordError, Retryable, UserError
from cluster.contracts.protocols import WorkerHandle
from cluster.contracts.records import Draw, Prompt, Rollout
from cluster.loop.members import Member, Members

LARGEST_PART = 128  # prompts
MOST_TRIES = 4  # of one part
LOOK_S = 0.5  # how often it is looked who serves


@dataclass(frozen=True, slots=True)
class Wanted:
    """``timeout_s``: for the whole of it."""

    prompts: Sequence[Prompt]
    samples: int
    draw: Draw
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Sampled:
    """All samples of all prompts, in order. ``repeated``: parts that were asked for once more."""

    rollouts: list[Rollout]
    repeated: int


@dataclass(slots=True)
class _Part:
    start: int
    prompts: Sequence[Prompt]
    tries: int = 0


@dataclass(slots=True)
class _Call:
    part: _Part
    handle: WorkerHandle
    member: Member

    @property
    def lost(self) -> bool:
        """Its worker is lost, or another process has taken its place."""
        serves = self.member.status in ("serving", "draining")
        return self.member.handle is not self.handle or not serves


async def sample_beside(members: Members, wanted: Wanted, workers: int) -> Sampled:
    """``workers``: how many there are to be; it decides the parts, whoever serves. Raises Retryable
    where the completions cannot be had, and UserError for a prompt that no engine takes."""
    work = _Sampling(members, wanted, workers)
    try:
        async with asyncio.timeout(wanted.timeout_s):
            return await work.run()
    except TimeoutError:
        raise Retryable(
            f"{work.lacking} of {len(wanted.prompts)} prompts had no completions within "
            f"{wanted.timeout_s:.0f} s{work.last_cause}"
        ) from None
    finally:
        await work.cancel()


class _Sampling:
    def __init__(self, members: Members, wanted: Wanted, workers: int) -> None:
        self._members = members
        self._wanted = wanted
        prompts = wanted.prompts
        size = min(LARGEST_PART, math.ceil(len(prompts) / max(1, workers)))
        self._waiting = deque(
            _Part(start, prompts[start : start + size]) for start in range(0, len(prompts), size)
        )
        # Of a worker that hangs, so that others have time for its part.
        self._call_s = wanted.timeout_s / 3
        self._calls: dict[asyncio.Task[list[Rollout]], _Call] = {}
        self._failed: set[tuple[str, int]] = set()  # processes that did not answer
        self._answers: dict[int, list[Rollout]] = {}
        self._repeated = 0
        self._cause = ""

    @property
    def lacking(self) -> int:
        """Prompts without completions."""
        waiting = sum(len(part.prompts) for part in self._waiting)
        return waiting + sum(len(call.part.prompts) for call in self._calls.values())

    @property
    def last_cause(self) -> str:
        return f"; the last failure: {self._cause}" if self._cause else ""

    async def run(self) -> Sampled:
        while self._waiting or self._calls:
            self._share_out()
            if self._calls:
                await asyncio.wait(self._calls, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            else:
                await asyncio.sleep(LOOK_S)
            for task, call in list(self._calls.items()):
                if task.done():
                    self._ended(task, call)
                elif call.lost:
                    del self._calls[task]
                    task.cancel()
                    self._again(call, f"{call.handle.name} is lost")
        rollouts = [r for start in sorted(self._answers) for r in self._answers[start]]
        return Sampled(rollouts, self._repeated)

    async def cancel(self) -> None:
        for task in self._calls:
            task.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)

    def _share_out(self) -> None:
        busy = {_process(call.handle) for call in self._calls.values()}
        free = [m for m in self._members.those("serving") if _process(m.handle) not in busy]
        # One that has failed is asked again only where there is nobody else.
        trusted = [m for m in free if _process(m.handle) not in self._failed]
        for member in trusted or ([] if self._calls else free):
            if not self._waiting:
                return
            part = self._waiting.popleft()
            part.tries += 1
            wanted, handle = self._wanted, member.handle
            asked = handle.sample(part.prompts, wanted.samples, self._call_s, wanted.draw)
            self._calls[asyncio.ensure_future(asked)] = _Call(part, handle, member)

    def _ended(self, task: asyncio.Task[list[Rollout]], call: _Call) -> None:
        del self._calls[task]
        try:
            answer = task.result()
        except UserError:
            raise
        except (AccordError, TimeoutError) as problem:
            self._again(call, str(problem) or f"{call.handle.name} gave no answer in time")
            return
        expected = len(call.part.prompts) * self._wanted.samples
        if len(answer) != expected:
            self._again(call, f"{call.handle.name} gave {len(answer)} of {expected} completions")
            return
        self._answers[call.part.start] = answer

    def _again(self, call: _Call, cause: str) -> None:
        self._cause = cause
        self._failed.add(_process(call.handle))
        if call.part.tries >= MOST_TRIES:
            raise Retryable(f"{call.part.tries} workers failed in turn; the last one: {cause}")
        self._repeated += 1
        self._waiting.appendleft(call.part)


def _process(handle: WorkerHandle) -> tuple[str, int]:
    return handle.name, handle.incarnation
