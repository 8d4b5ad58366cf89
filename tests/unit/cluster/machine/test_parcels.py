"""Parcels: what is packed on one host is the same on another, once, verified and private."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.contracts.errors import Retryable, UserError
from cluster.machine import parcels
from cluster.machine.parcel_files import Block, digest_of, listed, read_blocks
from cluster.machine.parcels import Parcel, cache_folder, fetched, pack, sweep, unpack


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "given" / "model"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "a.bin").write_bytes(bytes(range(256)) * 10)
    (root / "empty").touch()
    (root / "deep" / "er" / "b.txt").write_text("bee")
    (root / "deep" / "__pycache__").mkdir()
    (root / "deep" / "__pycache__" / "c.pyc").write_text("not sent")
    return root


@pytest.fixture(autouse=True)
def own_temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    monkeypatch.setattr(parcels, "_held", {})


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> list[Block]:
    """Stands for Ray's object store; chunks are numbers."""
    kept: list[Block] = []

    def put(block: Block, root: Path) -> int:
        kept.append(block.copy())
        return len(kept) - 1

    def get_all(parcel: Parcel) -> Iterator[Block]:
        return (kept[chunk] for chunk in parcel.chunks)

    monkeypatch.setattr(parcels, "_put", put)
    monkeypatch.setattr(parcels, "_get_all", get_all)
    monkeypatch.setattr(parcels, "CHUNK_BYTES", 1000)
    return kept


def elsewhere(parcel: Parcel) -> Parcel:
    """As it looks on a host that does not have the files."""
    return dataclasses.replace(parcel, path="/nowhere/at/all/" + Path(parcel.path).name)


def content(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }


def test_on_the_host_that_packed_it_is_the_path_itself(folder: Path, store: list[Block]) -> None:
    assert unpack(pack(folder)) == folder
    (folder / "a.bin").write_bytes(b"another content of the same name")
    assert unpack(pack(folder)) == folder


def test_a_file_that_was_changed_since_is_as_it_was_packed(
    folder: Path, store: list[Block]
) -> None:
    before, parcel = content(folder), pack(folder)
    (folder / "a.bin").write_bytes(b"changed")
    there = unpack(parcel)
    assert there != folder
    assert content(there) == before


def test_elsewhere_the_content_is_the_same_and_private(folder: Path, store: list[Block]) -> None:
    parcel = elsewhere(pack(folder))
    there = unpack(parcel)
    assert there.name == "model"
    assert content(there) == content(folder)
    assert len(store) == 3, "2563 bytes in blocks of 1000, over the limits of files"
    assert parcel.size == 2563
    assert cache_folder().stat().st_mode & 0o777 == 0o700
    assert unpack(parcel) == there


def test_a_single_file_keeps_its_name(folder: Path, store: list[Block]) -> None:
    there = unpack(elsewhere(pack(folder / "a.bin")))
    assert there.name == "a.bin"
    assert there.read_bytes() == (folder / "a.bin").read_bytes()


def test_a_copy_under_another_name_is_a_parcel_of_its_own(
    folder: Path, store: list[Block], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(folder, folder.with_name("copy"))
    first = unpack(elsewhere(pack(folder)))
    monkeypatch.setattr(parcels, "_held", {})  # another process of that host
    second = unpack(elsewhere(pack(copy)))
    assert (first.name, second.name) == ("model", "copy")
    assert content(second) == content(first)


def test_only_wanted_files_are_sent(folder: Path, store: list[Block]) -> None:
    (folder / "broken").symlink_to("/no/such/thing")  # nobody asked for it
    there = unpack(elsewhere(pack(folder, lambda path: path.is_dir() or path.suffix == ".txt")))
    assert list(content(there)) == ["deep/er/b.txt"]


def test_links_are_followed(folder: Path, store: list[Block], tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("linked")
    (folder / "weights").symlink_to(tmp_path / "blob")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "x").write_text("x")
    (folder / "linked").symlink_to(tmp_path / "more")
    there = content(unpack(elsewhere(pack(folder))))
    assert there["weights"] == b"linked"
    assert there["linked/x"] == b"x"


def test_the_digest_tells_names_and_bytes_apart(tmp_path: Path, store: list[Block]) -> None:
    digests = set()
    for at, files in enumerate([{"a": "12", "b": ""}, {"a": "1", "b": "2"}, {"ab": "12"}]):
        root = tmp_path / str(at) / "x"
        root.mkdir(parents=True)
        for name, text in files.items():
            (root / name).write_text(text)
        digests.add(pack(root).digest)
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda root: (root / "gone").symlink_to("/no/such/thing"), "is a link to nothing"),
        (lambda root: (root / "deep" / "up").symlink_to(root), "directory that contains it"),
        (lambda root: os.mkfifo(root / "pipe"), "neither a file nor a directory"),
    ],
)
def test_what_cannot_be_sent_is_one_clear_message(folder: Path, spoil: Any, said: str) -> None:
    spoil(folder)
    with pytest.raises(UserError, match=said):
        pack(folder)


def test_a_missing_path_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read on .*No such file"):
        pack(tmp_path / "none")
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match="holds no file to send"):
        pack(tmp_path / "void")


def test_a_file_that_shrinks_while_it_is_read(folder: Path) -> None:
    files = listed(folder, lambda path: True)
    (folder / "a.bin").write_bytes(b"short")
    with pytest.raises(UserError, match="became shorter"):
        list(read_blocks(folder, files, digest_of("model", files), 1000))


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damage_on_the_way_is_noticed_and_leaves_nothing(
    folder: Path, store: list[Block], damage: str
) -> None:
    parcel = elsewhere(pack(folder))
    if damage == "flip":
        store[1][5] ^= 1
    else:
        store.pop()
        parcel.chunks.pop()
    with pytest.raises(Retryable, match="arrived damaged"):
        unpack(parcel)
    assert not [path for path in cache_folder().iterdir() if path.is_dir()]
    sweep()
    assert list(cache_folder().iterdir()) == []


def test_a_full_disk_names_host_and_place(
    folder: Path, store: list[Block], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(parcels.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"cannot keep .* are free"):
        unpack(elsewhere(pack(folder)))


def test_a_foreign_cache_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "temp" / f"accord-{os.getuid()}").mkdir(mode=0o777)
    os.chmod(tmp_path / "temp" / f"accord-{os.getuid()}", 0o777)
    with pytest.raises(UserError, match="not a private directory"):
        cache_folder()


def test_what_is_in_use_stays_and_what_is_not_goes(folder: Path, store: list[Block]) -> None:
    parcel = elsewhere(pack(folder))
    there = unpack(parcel)
    sweep()
    assert there.is_dir(), "this process holds it"
    os.close(parcels._held.pop(parcel.digest)[0])  # as if the process had ended
    other = unpack(elsewhere(pack(folder / "a.bin")))
    assert not there.exists()
    assert other.exists()


def test_what_is_about_to_be_free_is_waited_for(folder: Path, store: list[Block]) -> None:
    parcel = elsewhere(pack(folder))
    there = unpack(parcel)
    sweep([parcel.digest], patience_s=0.2)
    assert there.is_dir()
    use = parcels._held.pop(parcel.digest)[0]
    threading.Timer(0.2, os.close, (use,)).start()
    sweep([parcel.digest], patience_s=30)
    assert not there.exists()


def _fetch_in_a_process(parcel: Parcel, cache: Path, block: Block, counts: Any, met: Any) -> None:
    def blocks() -> Iterator[Block]:
        with counts.get_lock():
            counts.value += 1
        yield block

    fetched(parcel, cache, blocks())
    met.wait(20)  # all of them use it at the same time


def test_processes_of_a_host_fetch_once_and_use_it_together(
    folder: Path, store: list[Block]
) -> None:
    parcel = elsewhere(pack(folder))
    context = multiprocessing.get_context("fork")
    counts, met = context.Value("i", 0), context.Barrier(8)
    arguments = (parcel, cache_folder(), np.concatenate(store), counts, met)
    processes = [context.Process(target=_fetch_in_a_process, args=arguments) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 8
    assert counts.value == 1
