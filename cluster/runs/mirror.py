"""A run whose directory is a URL of `fsspec` (``s3://bucket/runs``): it works in a folder of the
driver's host, and its files are copied to the URL after each checkpoint and at the end.

A checkpoint's manifest is copied after its other files, so that what is torn there is never taken
for whole. `Run.open` takes the URL of a run and works on a copy of what is newer.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.contracts.errors import UserError
from cluster.runs.checkpoints import step_of

VARIABLE = "ACCORD_WORK"
"""Environment variable: where runs with a URL work; without it ~/.cache/accord/runs."""
_URL = re.compile(r"([a-z][a-z0-9+.-]+):/{1,3}(?=[^/])")
_LEFT_OUT = ("driver.lock", "control.json", "live.json")  # of the process that drives the run
_MANIFEST = "manifest.json"
LEASE = ".driver.json"
"""Says at the URL which process drives the run (``mirror_lease``)."""


def url_of(path: str) -> str | None:
    """The URL that ``path`` is, also when a `Path` has taken one of its slashes; None for a path of
    this host (``file:///runs`` is one)."""
    found = _URL.match(path)
    if found is None or found[1] == "file":
        return None
    slashes = "///" if found[1] == "local" else "//"
    return f"{found[1]}:{slashes}{path[found.end() :]}"


def folder_of(path: str) -> Path:
    """Where the files of ``path`` are on this host: for a URL, the folder that it works in."""
    url = url_of(path)
    if url is None:
        return Path("/" + path[5:].lstrip("/")) if path.startswith("file:/") else Path(path)
    parent, _, name = url.rstrip("/").rpartition("/")
    work = Path(os.environ.get(VARIABLE) or Path.home() / ".cache" / "accord" / "runs")
    return work / hashlib.sha256(parent.encode()).hexdigest()[:16] / name


@dataclass(slots=True)
class Mirror:
    """The copy of ``folder`` at ``url``. Its methods take long: call them beside the loop."""

    url: str
    folder: Path
    _copied: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> size, mtime

    def probe(self) -> None:
        """Write, read, move and delete a file there. Raises UserError where that does not work."""
        parent, word = self.url.rpartition("/")[0], secrets.token_hex(8)
        with self.explained("use"):
            fs, root = _opened(parent)
            first, second = f"{root}/.probe-{word}", f"{root}/.probe-{word}-moved"
            fs.makedirs(root, exist_ok=True)
            fs.pipe_file(first, word.encode())
            fs.mv(first, second)
            same = fs.cat_file(second) == word.encode()
            fs.rm(second)
            if not same:
                raise OSError("it does not give back what was written")

    def exists(self) -> bool:
        with self.explained("read"):
            fs, root = _opened(self.url)
            return bool(fs.exists(f"{root}/{_MANIFEST}"))

    def push(self) -> None:
        """Copy what has changed since the last time; then remove the checkpoints that the run has
        given up. Raises OSError."""
        fs, root = _opened(self.url)
        for path in self._files():
            name = path.relative_to(self.folder).as_posix()
            with contextlib.suppress(FileNotFoundError):  # the run has removed it meanwhile
                found = path.stat()
                state = found.st_size, found.st_mtime_ns
                if self._copied.get(name) != state:
                    fs.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
                    fs.put_file(str(path), f"{root}/{name}")
                    self._copied[name] = state
        for name in self._checkpoints(fs, root):
            if not (self.folder / "checkpoints" / name).is_dir():
                fs.rm(f"{root}/checkpoints/{name}", recursive=True)

    def pull(self) -> None:
        """Bring the run here, unless the copy here is as new. Raises UserError."""
        with self.explained("read"):
            fs, root = _opened(self.url)
            theirs = max(map(step_of, self._checkpoints(fs, root)), default=-1)
            here = (step_of(path.name) for path in (self.folder / "checkpoints").glob("step-*"))
            if (self.folder / _MANIFEST).is_file() and max(here, default=-1) >= theirs:
                return
            for source, about in sorted(fs.find(root, detail=True).items()):
                name = source.removeprefix(root).lstrip("/")
                if name == LEASE:
                    continue
                target = self.folder / name
                if not (target.is_file() and target.stat().st_size == about["size"]):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    fs.get_file(source, str(target))

    # One small file there. What a store raises is its own.

    def read(self, name: str) -> bytes | None:
        """None where there is no such file."""
        fs, root = _opened(self.url)
        try:
            return bytes(fs.cat_file(f"{root}/{name}"))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes, *, create: bool = False) -> None:
        """``create``: raises FileExistsError where it is there already and the store can tell."""
        fs, root = _opened(self.url)
        fs.makedirs(root, exist_ok=True)
        fs.pipe_file(f"{root}/{name}", content, mode="create" if create else "overwrite")

    def remove(self, name: str) -> None:
        fs, root = _opened(self.url)
        fs.rm(f"{root}/{name}")

    def _files(self) -> list[Path]:
        """Those to be copied: manifests after what they name, the run's own last of all."""
        found = []
        for path in self.folder.rglob("*"):
            parts = path.relative_to(self.folder).parts
            hidden = any(part.startswith(".") for part in parts)
            if path.is_file() and not hidden and parts[0] not in (*_LEFT_OUT, "weights"):
                found.append(path)
        return sorted(found, key=lambda path: (path.name == _MANIFEST, -len(path.parts), path))

    @staticmethod
    def _checkpoints(fs: Any, root: str) -> list[str]:
        """Names of the complete checkpoints there."""
        found = fs.glob(f"{root}/checkpoints/step-*/{_MANIFEST}")
        return [str(path).split("/")[-2] for path in found]

    @contextlib.contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Turns what a store raises into UserError."""
        try:
            yield
        except UserError:
            raise
        # Each kind of store has errors of its own, and packages that may be missing.
        except Exception as problem:
            raise UserError(
                f"cannot {what} it: {type(problem).__name__}: {problem}",
                where=self.url,
                fix="check the address, the rights, and that fsspec's package for it is installed "
                "(s3fs, gcsfs, adlfs ...)",
            ) from problem


def _opened(url: str) -> tuple[Any, str]:
    import fsspec

    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return fs, str(root).rstrip("/")
