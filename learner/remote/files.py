"""The files of a learner that may run on another host than the driver: what it writes comes into
the run directory, and the checkpoint it starts from gets to it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.exceptions import RayError, RayTaskError

from cluster.contracts.durable import FileDigest, write_text
from cluster.contracts.errors import NotSaved, UserError
from cluster.machine.parcels import pack
from learner.model_files import complete
from learner.outbox import copy_files
from learner.remote.processes import LearnerProcesses, error_of
from learner.settings import LearnerSettings

_ROLLOUTS_TIMEOUT_S = 120.0
_CHECKPOINT = "checkpoint"  # folder of the outbox


class FileBridge:
    """``outboxes``: numbers of the processes that do not see the run directory, and write into an
    outbox of their own host. The first process alone writes rollouts."""

    def __init__(self, processes: LearnerProcesses) -> None:
        self._processes = processes
        self._copying = asyncio.Lock()  # one file after the other
        self._carrying: asyncio.Task[None] | None = None
        self._run_dir: str | None = None
        self.outboxes: tuple[int, ...] = ()

    async def open(self, settings: LearnerSettings, limit: float) -> None:
        """Give the processes what they do not see of the run directory: an outbox, and the
        checkpoint that a resumed run starts from."""
        self._run_dir = settings.run_dir
        sees = await self._see_run_directory(limit)
        self.outboxes = tuple(rank for rank, seen in enumerate(sees) if not seen)
        if 0 in self.outboxes and settings.weights.transport == "disk":
            raise UserError(
                "the learner's host does not see the run directory, through which weights would go",
                where="weights.transport = disk",
                fix="set weights.transport = 'object_store', or run.dir to a shared directory",
            )
        if not self.outboxes:
            return
        without = [self._processes.actors[rank] for rank in self.outboxes]
        await self._processes.ask(without, "use_outbox", limit, "to make its outbox")
        checkpoint, replay = settings.resume_from, settings.replay
        if checkpoint is not None or replay:
            parcel = None
            if checkpoint is not None:
                parcel = await asyncio.to_thread(pack, Path(checkpoint))
            files = [await asyncio.to_thread(pack, Path(file)) for file in replay]
            purpose = "to fetch its checkpoint"
            await self._processes.ask(without, "use_checkpoint", limit, purpose, parcel, files)

    async def _see_run_directory(self, limit: float) -> list[bool]:
        """Of each process, whether it and this one see the same run directory."""
        if self._run_dir is None:
            return [True for _ in self._processes.actors]  # nothing will be written
        word = secrets.token_hex(16)
        probe = Path(self._run_dir) / f".probe-{word}"
        try:
            write_text(probe, word)
            purpose = "to look at the run directory"
            told = await self._processes.ask(
                self._processes.actors, "sees", limit, purpose, str(probe), word
            )
            seen = [probe.with_name(name) if name else None for name in told]
            return [
                path is not None and path.is_file() and path.read_text(encoding="utf-8") == word
                for path in seen
            ]
        finally:
            for left in probe.parent.glob(f"{probe.name}*"):
                left.unlink(missing_ok=True)

    async def store(self, directory: str, limit: float) -> tuple[FileDigest, ...]:
        """Write the copies of the state below `directory` of this host, and finish the checkpoint
        there. Raises NotSaved where a disk does not take it."""
        ranks = range(len(self._processes.actors)) or range(1)
        # All have ended before the folder is given up: none may write into the next one's.
        answers = await asyncio.gather(
            *(self._store_share(rank, directory, limit) for rank in ranks), return_exceptions=True
        )
        try:
            files: list[FileDigest] = []
            for answer in answers:
                if isinstance(answer, BaseException):
                    raise answer
                files += answer
            await self.bring_rollouts()
            return await asyncio.to_thread(complete, Path(directory), files)
        except OSError as problem:
            raise NotSaved(f"{directory}: {problem}") from problem

    async def _store_share(self, rank: int, directory: str, limit: float) -> tuple[FileDigest, ...]:
        """What one process writes."""
        apart = rank in self.outboxes
        try:
            files: tuple[FileDigest, ...] = await self._processes.ask_beside(
                "write_snapshot", limit, _CHECKPOINT if apart else directory, rank=rank
            )
            if apart:
                await self._copy(rank, files, Path(directory), _CHECKPOINT)
        finally:
            if apart and rank < len(self._processes.actors):
                self._processes.actors[rank].outbox.remote("remove", _CHECKPOINT)
        return files

    def carry_rollouts(self) -> tuple[str, ...]:
        """Begin to copy what the learner has finished to write; the next step need not wait.
        Returns what kept the last such copying from its end. What is left is tried again now."""
        if 0 not in self.outboxes or (self._carrying is not None and not self._carrying.done()):
            return ()
        before, self._carrying = self._carrying, asyncio.ensure_future(self.bring_rollouts())
        # Looked at by the next call, or, of the last one, never.
        self._carrying.add_done_callback(lambda task: task.cancelled() or task.exception())
        problem = before.exception() if before is not None and not before.cancelled() else None
        return () if problem is None else (f"{self._run_dir}: {problem}",)

    async def bring_rollouts(self) -> None:
        if 0 not in self.outboxes:
            return
        async with self._copying:
            files = await self._processes.ask_beside("outbox", _ROLLOUTS_TIMEOUT_S, "rollouts")
            for file in files:
                await self._copy(0, [file], Path(str(self._run_dir)))
                # Only now: what could not be written here is tried again after the next step.
                await self._processes.ask_beside("outbox", _ROLLOUTS_TIMEOUT_S, "remove", file.name)

    async def close_outboxes(self, limit: float) -> None:
        for rank in self.outboxes:
            await self._processes.ask_beside("outbox", limit, "close", rank=rank)

    def close(self) -> None:
        if self._carrying is not None:
            self._carrying.cancel()

    async def _copy(
        self, rank: int, files: Sequence[FileDigest], target: Path, below: str = ""
    ) -> None:
        actor = self._processes.actors[rank]

        def ask(name: str, offset: int) -> Any:
            return actor.outbox.remote("read", name, offset).future()

        try:
            await asyncio.to_thread(copy_files, ask, files, target, below)
        except RayTaskError as problem:
            raise OSError(f"the learner's host could not read a file: {problem.cause}") from problem
        except RayError as problem:
            raise error_of(problem, "send its files") from None
