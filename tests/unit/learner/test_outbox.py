"""Files of a learner on another host: copied in pieces, and refused when a byte differs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.contracts import durable
from cluster.contracts.durable import digests_below
from learner import outbox as module
from learner.outbox import Outbox, copy_files


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 10)
    monkeypatch.setattr(durable, "CHUNK", 10)


class Wire:
    """Answers as the learner's process does, and may spoil one piece."""

    def __init__(self, box: Outbox, spoiled: int = -1) -> None:
        self.box, self.spoiled, self.asked = box, spoiled, 0

    def __call__(self, name: str, offset: int) -> Future[Any]:
        piece = self.box.read(name, offset).copy()
        if self.asked == self.spoiled:
            piece[0] ^= 1
        self.asked += 1
        answer: Future[Any] = Future()
        answer.set_result(piece)
        return answer


@pytest.fixture
def box(tmp_path: Path) -> Outbox:
    made = Outbox(tmp_path)
    folder = made.path / "checkpoint" / "policy"
    folder.mkdir(parents=True)
    for name, size in {"empty": 0, "one": 10, "odd": 27, "even": 30}.items():
        (folder / name).write_bytes(np.arange(size, dtype=np.uint8).tobytes())
    return made


def test_files_of_every_length_arrive_as_they_were(box: Outbox, tmp_path: Path) -> None:
    files = digests_below(box.path / "checkpoint")
    copy_files(Wire(box), files, tmp_path / "run", "checkpoint")
    assert digests_below(tmp_path / "run") == files
    assert [file.name for file in files] == [
        f"policy/{name}" for name in ("empty", "even", "odd", "one")
    ]


@pytest.mark.parametrize("piece", range(7))
def test_a_byte_that_changed_on_the_way_is_noticed(box: Outbox, tmp_path: Path, piece: int) -> None:
    files = digests_below(box.path / "checkpoint")
    with pytest.raises(OSError, match="did not arrive as it was sent"):
        copy_files(Wire(box, piece), files, tmp_path / "run", "checkpoint")
    assert digests_below(tmp_path / "run") in [files[:n] for n in range(len(files))]


def test_a_file_cut_short_at_the_sender_is_noticed(box: Outbox, tmp_path: Path) -> None:
    files = digests_below(box.path / "checkpoint")
    os.truncate(box.path / "checkpoint" / "policy" / "odd", 15)
    with pytest.raises(OSError, match="did not arrive"):
        copy_files(Wire(box), files, tmp_path / "run", "checkpoint")


def test_rollouts_are_listed_until_they_were_copied(box: Outbox) -> None:
    (box.path / "rollouts").mkdir()
    for name in ("step-000001.parquet", ".step-000002.parquet.writing-7"):
        (box.path / "rollouts" / name).write_bytes(b"rows")
    assert [file.name for file in box.rollouts()] == ["rollouts/step-000001.parquet"]
    box.remove("rollouts/step-000001.parquet")
    assert box.rollouts() == ()
    box.remove("checkpoint")
    box.remove("checkpoint")  # twice does no harm
    assert not (box.path / "checkpoint").exists()


def test_what_a_killed_learner_left_is_removed_and_a_living_one_s_is_not(tmp_path: Path) -> None:
    code = (
        "import signal, sys; from pathlib import Path; from learner.outbox import Outbox; "
        f"box = Outbox(Path({str(tmp_path)!r})); print(box.path, flush=True); signal.pause()"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    theirs = Path(child.stdout.readline().strip())
    first = Outbox(tmp_path)
    assert theirs.is_dir()
    child.send_signal(signal.SIGKILL)
    child.wait(60)
    child.stdout.close()
    second = Outbox(tmp_path)
    assert not theirs.exists()
    assert first.path.is_dir()
    first.close()
    second.close()
    assert list(tmp_path.iterdir()) == []
