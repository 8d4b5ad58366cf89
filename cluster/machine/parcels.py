"""Files of one host, for roles on hosts that do not have them.

    driver:  parcel = pack(Path("model"))     # read once, put into Ray's object store in chunks
    role:    folder = unpack(parcel)          # the same content, wherever the role runs

`unpack` returns the packed path itself where the very same files lie there: on the host that packed
them, or on a disk that both hosts see. Elsewhere the first process of a host fetches them into a
private folder that is named after their digest, and every process of that host uses it. A process
keeps what it has unpacked for as long as it lives. What no process uses any more is removed by the
next `unpack` on that host, or by `sweep`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.contracts.errors import Retryable, UserError
from cluster.machine.parcel_files import (
    Block,
    PackedFile,
    Wanted,
    digest_of,
    listed,
    read_blocks,
    write_files,
)

CHUNK_BYTES = 16 << 20
CHUNK_TIMEOUT_S = 120.0  # for one chunk to arrive: a link of 2 Mbit/s manages it


@dataclass(frozen=True, slots=True)
class Parcel:
    """The content of a file or directory, to be handed to `unpack` in any process of the cluster.

    path: absolute, on `host`; digest: SHA-256 of names, sizes and bytes, in hex; chunks: references
    into Ray's object store, owned by the process that packed: they are lost when it ends.
    """

    path: str
    host: str
    digest: str
    files: tuple[PackedFile, ...]
    chunks: list[Any]
    is_file: bool = False

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


_held: dict[str, tuple[int, Path]] = {}  # digest -> (descriptor of its lock, path), this process's
_one_at_a_time = threading.Lock()


def pack(path: Path, wanted: Wanted = lambda path: True) -> Parcel:
    """Put a file, or what is `wanted` of a directory, into Ray's object store.

    Links to files and directories are followed. Raises UserError for a path that is missing,
    unreadable or empty, that holds anything but files, or that Ray's store cannot take.
    """
    root = Path(path).expanduser().absolute()
    files = listed(root, wanted)
    digest = digest_of(root.name, files)
    chunks = [_put(block, root) for block in read_blocks(root, files, digest, CHUNK_BYTES)]
    return Parcel(
        path=str(root),
        host=socket.gethostname(),
        digest=digest.hexdigest(),
        files=files,
        chunks=chunks,
        is_file=root.is_file(),
    )


def unpack(parcel: Parcel) -> Path:
    """The packed file or directory on this host. Blocks until it is there.

    Raises Retryable where the content does not arrive, UserError where this host cannot keep it.
    """
    if is_here(parcel):
        return Path(parcel.path)
    with _one_at_a_time:
        if parcel.digest not in _held:
            _held[parcel.digest] = fetched(parcel, cache_folder(), _get_all(parcel))
            sweep()
        return _held[parcel.digest][1]


def sweep(digests: Sequence[str] = (), patience_s: float = 0.0) -> None:
    """Remove what was unpacked on this host and is used by no process any more.

    digests: what is expected to go, as its processes are about to end; waited for a little.
    """
    deadline = time.monotonic() + patience_s
    _sweep_once()
    while any((cache_folder() / digest).exists() for digest in digests):
        if time.monotonic() > deadline:
            return
        time.sleep(0.1)
        _sweep_once()


def _sweep_once() -> None:
    for entry in sorted(cache_folder().glob("*.use")):
        with suppress(FileNotFoundError, BlockingIOError), ExitStack() as locks:
            # Both at once: nobody is about to use it, and nobody does.
            for path in (entry.with_suffix(".lock"), entry):
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                locks.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(entry.with_suffix(""), ignore_errors=True)
            entry.unlink()
            entry.with_suffix(".lock").unlink()


# -- on another host ------------------------------------------------------------------------------


def is_here(parcel: Parcel) -> bool:
    """Whether the packed path shows the very same files here."""
    root = Path(parcel.path)
    try:
        for file in parcel.files:
            facts = (root if parcel.is_file else root / file.name).stat()
            found = (facts.st_size, facts.st_ino, facts.st_mtime_ns)
            if found != (file.size, file.inode, file.modified_ns):
                return False
    except OSError:
        return False
    return True


def cache_folder() -> Path:
    """Where this host keeps what was unpacked: a folder that only this user can enter."""
    folder = Path(tempfile.gettempdir()) / f"accord-{os.getuid()}" / "parcels"
    for part in (folder.parent, folder):
        part.mkdir(mode=0o700, exist_ok=True)
        facts = part.lstat()
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
            raise UserError(
                f"is not a private directory of this user on {socket.gethostname()}",
                where=str(part),
                fix="remove it, or set TMPDIR to a directory of your own on that host",
            )
    return folder


def fetched(parcel: Parcel, folder: Path, blocks: Iterable[Block]) -> tuple[int, Path]:
    """(descriptor of the shared lock that keeps it, path) of the content below `folder`.

    One process of the host writes it; the others wait for that one and take no block.
    """
    place = folder / parcel.digest
    alone = _locked(folder / f"{parcel.digest}.lock")
    try:
        use = os.open(place.with_suffix(".use"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(use, fcntl.LOCK_SH)
            if not place.is_dir():
                _write(parcel, place, blocks)
        except BaseException:
            os.close(use)
            raise
    finally:
        os.close(alone)
    return use, place / Path(parcel.path).name


def _locked(path: Path) -> int:
    """A descriptor of the lock file, locked by this process alone."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        os.close(descriptor)  # it was removed while this process waited


def _write(parcel: Parcel, place: Path, blocks: Iterable[Block]) -> None:
    fresh = place.with_name(f".{place.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)  # of a process that was killed
    try:
        _check_room(parcel, place.parent)
        fresh.mkdir(mode=0o700)
        base = fresh if parcel.is_file else fresh / Path(parcel.path).name
        digest = digest_of(Path(parcel.path).name, parcel.files)
        write_files(parcel.files, base, blocks, digest)
        if digest.hexdigest() != parcel.digest:
            raise Retryable(f"{_named(parcel)} arrived damaged")
        fresh.rename(place)
    except OSError as problem:
        raise UserError(
            f"cannot keep {parcel.path} of {parcel.host} on {socket.gethostname()}: "
            f"{problem.strerror or problem}",
            where=str(place.parent),
            fix="free space there, or set TMPDIR to a larger disk before `ray start` on that host",
        ) from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _check_room(parcel: Parcel, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < parcel.size:
        raise OSError(f"{parcel.size >> 20} MiB are needed and {free >> 20} MiB are free")


# -- Ray ------------------------------------------------------------------------------------------


def _put(block: Block, root: Path) -> Any:
    import ray
    from ray.exceptions import ObjectStoreFullError, OutOfDiskError

    try:
        return ray.put(block)
    except (ObjectStoreFullError, OutOfDiskError) as problem:
        raise UserError(
            "does not fit into Ray's object store, which the other hosts would fetch it from "
            f"({str(problem).strip().splitlines()[0]})",
            where=str(root),
            fix="give `ray start` a larger --object-store-memory on this host, or free the disk of "
            "Ray's temporary directory, where the store puts what it has no room for",
        ) from None


def _get_all(parcel: Parcel) -> Iterator[Block]:
    import ray
    from ray.exceptions import RayError

    for ref in parcel.chunks:
        try:
            # Kept by no name of ours: the store may have no room for two at once.
            yield ray.get(ref, timeout=CHUNK_TIMEOUT_S)
        except (RayError, TimeoutError) as problem:
            reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
            raise Retryable(
                f"{_named(parcel)} did not reach {socket.gethostname()}: {reason}"
            ) from None


def _named(parcel: Parcel) -> str:
    return f"{parcel.path} of {parcel.host}"
