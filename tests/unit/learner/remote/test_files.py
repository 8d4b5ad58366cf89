"""Shares of a checkpoint from several processes: of one folder or several, whole or not at all."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from cluster.contracts.durable import FileDigest, digests_below
from cluster.contracts.errors import NotSaved
from learner.outbox import Outbox
from learner.remote.files import FileBridge


class Actor:
    """A process that writes one file, into the folder it is told or into its outbox."""

    def __init__(self, rank: int, outbox: Outbox | None = None) -> None:
        self.rank, self.box, self.fails = rank, outbox, ""
        self.outbox = self

    async def write_snapshot(self, directory: str) -> tuple[FileDigest, ...]:
        await asyncio.sleep(0.01 * (2 - self.rank))
        if self.fails:
            raise NotSaved(self.fails)
        root = Path(directory) if self.box is None else self.box.path / directory
        root.mkdir(parents=True, exist_ok=True)
        (root / f"rank-{self.rank}").write_bytes(bytes([self.rank]) * 100)
        return tuple(f for f in digests_below(root) if f.name == f"rank-{self.rank}")

    def remote(self, method: str, *args: Any) -> Any:
        """Of the outbox."""
        answer: Any = Future()
        answer.set_result(getattr(self.box, method)(*args))
        answer.future = lambda: answer
        return answer


class Processes:
    def __init__(self, actors: list[Actor]) -> None:
        self.actors = actors
        self.written: list[int] = []

    async def ask_beside(self, method: str, limit: float, *args: Any, rank: int = 0) -> Any:
        assert limit == 5.0
        found = await getattr(self.actors[rank], method)(*args)
        self.written.append(rank)
        return found


@pytest.fixture
def world(tmp_path: Path) -> Any:
    """(bridge, processes, outbox): the second of two processes lies on another host."""
    (tmp_path / "other").mkdir()
    outbox = Outbox(tmp_path / "other")
    processes = Processes([Actor(0), Actor(1, outbox)])
    bridge: Any = FileBridge(processes)  # type: ignore[arg-type]
    bridge.outboxes = (1,)
    yield bridge, processes, outbox
    outbox.close()


def test_shares_of_two_disks_come_into_one_folder(world: Any, tmp_path: Path) -> None:
    bridge, _, outbox = world
    files = asyncio.run(bridge.store(str(tmp_path / "staging"), 5.0))
    assert files == digests_below(tmp_path / "staging")
    assert [file.name for file in files] == ["rank-0", "rank-1"]
    assert not (outbox.path / "checkpoint").exists()


def test_one_that_cannot_write_leaves_no_checkpoint_and_nobody_writes_on(
    world: Any, tmp_path: Path
) -> None:
    bridge, processes, outbox = world
    processes.actors[1].fails = "its disk is full"
    with pytest.raises(NotSaved, match="its disk is full"):
        asyncio.run(bridge.store(str(tmp_path / "staging"), 5.0))
    # The first one was waited for: the next checkpoint's folder may be this one's.
    assert processes.written == [0]
    assert not (outbox.path / "checkpoint").exists()
