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
from learner.outbox import copy_files
from learner.remote.processes import LearnerProcesses, error_of
from learner.settings import LearnerSettings

_ROLLOUTS_TIMEOUT_S = 120.0
_CHECKPOINT = "checkpoint"  # folder of the outbox


class FileBridge:
    """``needed``: the first process, which writes, does not see the run directory, and writes into
    an outbox."""

    def __init__(self, processes: LearnerProcesses) -> None:
        self._processes = processes
        self._copying = asyncio.Lock()  # one file after the other
        self._carrying: asyncio.Task[None] | None = None
        self._run_dir: str | None = None
        self.needed = False

    async def open(self, settings: LearnerSettings, limit: float) -> None:
        """Give the processes what they do not see of the run directory: an outbox to the first,
        which writes, and the checkpoint that a resumed run starts from to all."""
        self._run_dir = settings.run_dir
        sees = await self._see_run_directory(limit)
        self.needed = not sees[0]
        if self.needed:
            if settings.weights.transport == "disk":
                raise UserError(
                    "the learner's host does not see the run directory, through which weights "
                    "would go",
                    where="weights.transport = disk",
                    fix="set weights.transport = 'object_store', or run.dir to a shared directory",
                )
            await self._processes.first("use_outbox", limit, "to make its outbox")
        checkpoint, replay = settings.resume_from, settings.replay
        if (checkpoint is not None or replay) and not all(sees):
            parcel = None
            if checkpoint is not None:
                parcel = await asyncio.to_thread(pack, Path(checkpoint))
            files = [await asyncio.to_thread(pack, Path(file)) for file in replay]
            await self._processes.call(
                "use_checkpoint", limit, "to fetch its checkpoint", parcel, files
            )

    async def _see_run_directory(self, limit: float) -> list[bool]:
        """Of each process, whether it and this one see the same run directory."""
        if self._run_dir is None:
            return [True for _ in self._processes.actors]  # nothing will be written
        word = secrets.token_hex(16)
        probe = Path(self._run_dir) / f".probe-{word}"
        seen = probe.with_name(f"{probe.name}-seen")
        try:
            write_text(probe, word)
            purpose = "to look at the run directory"
            theirs = await self._processes.ask(
                self._processes.actors, "sees", limit, purpose, str(probe), word
            )
            here = seen.is_file() and seen.read_text(encoding="utf-8") == word
            return [here and bool(answer) for answer in theirs]
        finally:
            probe.unlink(missing_ok=True)
            seen.unlink(missing_ok=True)

    async def store(self, directory: str, limit: float) -> tuple[FileDigest, ...]:
        """Write the copy of the state below `directory` of this host. Raises NotSaved where a disk
        does not take it."""
        place = _CHECKPOINT if self.needed else directory
        try:
            files: tuple[FileDigest, ...] = await self._processes.ask_beside(
                "write_snapshot", limit, place
            )
            if self.needed:
                await self._copy(files, Path(directory), _CHECKPOINT)
                await self.bring_rollouts()
        except OSError as problem:
            raise NotSaved(f"{directory}: {problem}") from problem
        finally:
            if self.needed and self._processes.actors:
                self._processes.actors[0].outbox.remote("remove", _CHECKPOINT)
        return files

    def carry_rollouts(self) -> tuple[str, ...]:
        """Begin to copy what the learner has finished to write; the next step need not wait.
        Returns what kept the last such copying from its end. What is left is tried again now."""
        if not self.needed or (self._carrying is not None and not self._carrying.done()):
            return ()
        before, self._carrying = self._carrying, asyncio.ensure_future(self.bring_rollouts())
        # Looked at by the next call, or, of the last one, never.
        self._carrying.add_done_callback(lambda task: task.cancelled() or task.exception())
        problem = before.exception() if before is not None and not before.cancelled() else None
        return () if problem is None else (f"{self._run_dir}: {problem}",)

    async def bring_rollouts(self) -> None:
        if not self.needed:
            return
        async with self._copying:
            files = await self._processes.ask_beside("outbox", _ROLLOUTS_TIMEOUT_S, "rollouts")
            for file in files:
                await self._copy([file], Path(str(self._run_dir)))
                # Only now: what could not be written here is tried again after the next step.
                await self._processes.ask_beside("outbox", _ROLLOUTS_TIMEOUT_S, "remove", file.name)

    def close(self) -> None:
        if self._carrying is not None:
            self._carrying.cancel()

    async def _copy(self, files: Sequence[FileDigest], target: Path, below: str = "") -> None:
        actor = self._processes.actors[0]

        def ask(name: str, offset: int) -> Any:
            return actor.outbox.remote("read", name, offset).future()

        try:
            await asyncio.to_thread(copy_files, ask, files, target, below)
        except RayTaskError as problem:
            raise OSError(f"the learner's host could not read a file: {problem.cause}") from problem
        except RayError as problem:
            raise error_of(problem, "send its files") from None
