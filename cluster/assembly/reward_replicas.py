"""The reward services of a run: as many as are wanted, each started again when its process dies."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.contracts.errors import AccordError, Fatal
from cluster.contracts.protocols import Scorer
from cluster.loop.supervision import WINDOW_S, Loss, Restart, decide

NOTICED_S = 15.0
"""Within this time every worker has looked up the addresses again, and asks a service that was
taken out no more."""


class Service(Protocol):
    """``reward_service.remote.RewardServiceHandle``."""

    @property
    def address(self) -> str: ...

    async def started(self) -> None: ...

    async def death(self) -> str: ...

    async def restart(self) -> None: ...

    def stop(self, timeout_s: float = 10.0) -> None: ...


class RewardReplicas:
    """``begin``: begins to start one more service. ``publish``: tells workers where those that
    serve listen; workers find the others within ``NOTICED_S`` seconds."""

    def __init__(
        self, begin: Callable[[], Service], count: int, publish: Callable[[Sequence[str]], None]
    ) -> None:
        self._begin = begin
        self._publish = publish
        self._services = [begin() for _ in range(count)]
        self._serving: list[Service] = []
        self._tasks: dict[Service, asyncio.Task[None]] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._event: Callable[..., None] = lambda kind, **detail: None
        self._failed = asyncio.Event()
        self._problem: AccordError | None = None
        self._wanted = count
        self._deaths: list[tuple[float, str]] = []  # when and how

    @property
    def first(self) -> Any:
        return self._services[0]

    @property
    def services(self) -> Sequence[Service]:
        return tuple(self._services)

    def deaths(self, within_s: float = WINDOW_S) -> list[str]:
        """How processes of services have ended of late without being asked to, the last one last;
        that one could not be started counts, too."""
        now = time.monotonic()
        return [cause for at, cause in self._deaths if now - at <= within_s]

    async def ready(self) -> None:
        """Until those of the beginning serve. Raises what keeps one of them from it."""
        await asyncio.gather(*(self._serve(service) for service in self._services))

    async def keep_up(self, event: Callable[..., None]) -> None:
        """Start a service again whenever its process dies, with growing pauses. Workers keep what
        is to be scored meanwhile, and end the run when that takes too long; so this raises only
        where a service says that it cannot work (UserError)."""
        self._event = event
        self._failed = asyncio.Event()  # of this event loop: a run that goes back begins another
        for service in self._services:
            self._keep(service)
        try:
            await self._failed.wait()
            assert self._problem is not None
            raise self._problem
        finally:
            for task in [*self._tasks.values(), *self._leaving]:
                task.cancel()

    def scale(self, count: int) -> None:
        """Have ``count`` services from now on; returns at once. One that is taken out still
        answers what workers have sent it."""
        self._wanted = count
        for _ in range(count - len(self._services)):
            service = self._begin()
            self._services.append(service)
            self._keep(service, new=True)
        while len(self._services) > count:
            service = self._services.pop()
            self._tasks.pop(service).cancel()
            self._no_longer(service)
            leaving = asyncio.ensure_future(self._retire(service))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
        self._tell()

    def runs_at(self, host: str) -> bool:
        return any(service.address.rpartition(":")[0] == host for service in self._serving)

    def stop(self, timeout_s: float) -> None:
        for service in self._services:
            service.stop(timeout_s)

    async def _serve(self, service: Service) -> None:
        await service.started()
        if service not in self._serving:  # a run that has gone back asks again
            self._serving.append(service)
        self._publish([one.address for one in self._serving])

    def _no_longer(self, service: Service) -> None:
        if service in self._serving:
            self._serving.remove(service)
        if self._serving:  # of none at all, the last addresses stay: one will listen there again
            self._publish([one.address for one in self._serving])

    def _keep(self, service: Service, *, new: bool = False) -> None:
        self._tasks[service] = asyncio.ensure_future(self._kept(service, new))

    async def _kept(self, service: Service, new: bool) -> None:
        if new:
            try:
                await self._serve(service)
            except AccordError as problem:  # the others go on
                self._services.remove(service)
                self._wanted = len(self._services)
                self._tell(str(problem))
                return
            self._tell()
        try:
            losses: list[Loss] = []
            while True:
                cause = await service.death()
                self._no_longer(service)
                await self._again(service, cause, losses)
        except AccordError as problem:
            self._problem = problem
            self._failed.set()

    async def _again(self, service: Service, cause: str, losses: list[Loss]) -> None:
        while cause:
            losses.append(Loss(time.monotonic()))
            self._deaths.append((losses[-1].at, cause))
            self._event("reward_service_lost", cause=cause)
            pause = decide(losses, losses[-1].at, max_restarts=sys.maxsize)
            await asyncio.sleep(pause.after_s if isinstance(pause, Restart) else 0.0)
            try:
                await service.restart()
                cause = ""
            except Fatal as problem:  # it died once more
                cause = str(problem)
        self._serving.append(service)
        self._publish([one.address for one in self._serving])
        seconds = round(time.monotonic() - losses[-1].at, 3)
        self._event("reward_service_restarted", address=service.address, seconds=seconds)

    async def _retire(self, service: Service) -> None:
        await asyncio.sleep(NOTICED_S)
        await asyncio.to_thread(service.stop)

    def _tell(self, cause: str = "") -> None:
        """Says how many serve, once it is what was wanted, or why not."""
        if cause or len(self._serving) == self._wanted:
            self._event(
                "reward_replicas", wanted=self._wanted, serving=len(self._serving), cause=cause
            )


@dataclass(frozen=True, slots=True)
class RewardRole:
    """The run's reward services. ``clients(tokenizer)``: a worker's connection to them, made in the
    worker's process; ``replicas``: those started here, None where one was given."""

    clients: Callable[..., Scorer]
    replicas: RewardReplicas | None = None
