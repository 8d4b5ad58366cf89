"""The checkpoints of a run: they exist only once their manifest does, and are used only if every
byte is the one that was written.

    checkpoints/step-000010/{policy/, trainer.json, ..., run_state.json, manifest.json}
                .staging-000020/       being written
                damaged-step-000030/   was found damaged when the run was resumed

Nothing here runs on the event loop: hashing and deleting many gigabytes takes minutes.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.contracts.crash_points import passing
from cluster.contracts.durable import FileDigest, digest_of, json_text, sync, write_json, write_text
from cluster.contracts.errors import NotSaved, UserError
from cluster.contracts.records import RunState
from cluster.runs.evaluations import best_of

MANIFEST = "manifest.json"
RUN_STATE = "run_state.json"
MUST_HAVE = ("trainer.json", RUN_STATE)
POLICY = ("policy/config.json", "policy/*.safetensors", "policy/tokenizer*")
ADAPTER = ("*adapter/adapter_config.json", "*adapter/*.safetensors", "*adapter/tokenizer*")
"""Without a file of each of these patterns a checkpoint cannot be resumed from: it has a policy or,
under LoRA, an adapter (`adapter/`) or those of several policies (`policies/NAME/adapter/`)."""
ROOM_LEFT = 64 << 20  # bytes of the disk that a checkpoint leaves free, for what else is written


@dataclass(frozen=True, slots=True)
class Found:
    """A good checkpoint. ``passed_over``: newer ones, and what is wrong with each."""

    path: Path
    state: RunState
    passed_over: Mapping[Path, str]


@dataclass(slots=True)
class Checkpoints:
    """The folder ``checkpoints/`` of a run. ``event``: where what was found damaged is noted."""

    folder: Path
    event: Callable[..., None]
    _verified: set[Path] = field(default_factory=set)  # by this process; not read a second time

    def path_of(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def complete(self) -> list[Path]:
        """Those with a manifest, oldest first; their files are not looked at."""
        return [path for path in in_order(self.folder) if (path / MANIFEST).is_file()]

    def begin(self, step: int, nbytes: int = 0) -> Path:
        """An empty staging folder on the file system of the final one, which has room for
        ``nbytes``. Older checkpoints than the newest good one make room where there is none.

        Raises NotSaved when the disk is too full.
        """
        for left in self.folder.glob(".staging-*"):
            shutil.rmtree(left, ignore_errors=True)
        staging = self.folder / f".staging-{step:06d}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._lacks(nbytes):
                self._keep_newest(1)
            if lacking := self._lacks(nbytes):
                raise NotSaved(
                    f"the disk of {self.folder} is too full: a checkpoint of {nbytes / 1e6:.1f} MB "
                    f"and {ROOM_LEFT / 1e6:.0f} MB for other files lack {lacking / 1e6:.1f} MB"
                )
            staging.mkdir()
        except OSError as problem:
            raise NotSaved(f"{staging}: {problem}") from problem
        return staging

    def _lacks(self, nbytes: int) -> int:
        free = shutil.disk_usage(self.folder).free
        return max(0, nbytes + ROOM_LEFT - free) if nbytes else 0

    def commit(
        self, staging: Path, files: Iterable[FileDigest], state: RunState, keep: int
    ) -> Path:
        """Add the run's state and, last, the manifest; rename; keep the ``keep`` newest good ones.

        ``files``: what was written below ``staging``, as it was hashed on the way. Raises NotSaved,
        and leaves nothing, where one of them is not there or one that a checkpoint must have was
        never written.
        """
        final = self.path_of(state.step)
        try:
            write_json(staging / RUN_STATE, asdict(state))
            listed = [*files, digest_of(staging / RUN_STATE, RUN_STATE)]
            self._require(staging, listed)
            passing("driver.before_commit")
            write_text(staging / MANIFEST, manifest_text(state.step, listed))
            for folder in {staging, *(path.parent for path in staging.rglob("*"))}:
                sync(folder)
            passing("driver.after_manifest")
            if final.exists():  # damaged, or the run was resumed from an older one
                shutil.rmtree(final)
            os.replace(staging, final)
            sync(self.folder)
            passing("driver.after_commit")
        except OSError as problem:
            self.abandon(staging)
            raise NotSaved(f"{final}: {problem}") from problem
        except NotSaved:
            self.abandon(staging)
            raise
        self._verified.add(final)
        self._keep_newest(keep, final)
        return final

    def abandon(self, staging: Path) -> None:
        shutil.rmtree(staging, ignore_errors=True)

    def _require(self, staging: Path, files: Collection[FileDigest]) -> None:
        for file in files:
            path = staging / file.name
            if not path.is_file() or path.stat().st_size != file.nbytes:
                raise NotSaved(f"{path} is not the file of {file.nbytes} bytes that was written")
        if lacking := missing([file.name for file in files]):
            raise NotSaved(f"{staging} lacks {', '.join(lacking)}: the learner did not write it")

    def _keep_newest(self, keep: int, newest: Path | None = None) -> None:
        """Delete all but the ``keep`` newest good ones, of which ``newest`` is the first. Damaged
        ones are not counted; they stay, unless they are older than all that are kept. The one that
        best.json names is never deleted, nor counted."""
        good = [newest] if newest is not None else []
        best = best_of(self.folder.parent)
        for path in reversed(self.complete()):
            if path in good or (best is not None and path == self.path_of(best.step)):
                continue
            if len(good) >= keep:
                shutil.rmtree(path, ignore_errors=True)
                self._verified.discard(path)
            elif self._good(path):
                good.append(path)

    def _good(self, path: Path) -> bool:
        if path not in self._verified and verify_checkpoint(path) is None:
            self._verified.add(path)
        return path in self._verified

    def newest_good(self) -> Found:
        """The newest one whose every file is as it was written. Raises UserError when none is."""
        passed_over: dict[Path, str] = {}
        # Also one without a manifest, which can only have lost it: that is told, too.
        for path in reversed(in_order(self.folder)):
            problem = verify_checkpoint(path)
            if problem is None:
                self._verified.add(path)
                text = (path / RUN_STATE).read_text(encoding="utf-8")
                return Found(path, RunState(**json.loads(text)), passed_over)
            passed_over[path] = problem
            self.event("checkpoint_damaged", checkpoint=path.name, cause=problem)
        raise UserError(
            "no usable checkpoint" + "".join(f"\n  {p.name}: {x}" for p, x in passed_over.items()),
            where=str(self.folder),
            fix="restore the files, or start the run anew under another name"
            if passed_over
            else "start the run anew under another name; it was stopped before its first "
            "checkpoint",
        )

    def set_aside(self, damaged: Iterable[Path]) -> None:
        """Rename them to ``damaged-…``: nothing looks at them again, and a person can."""
        for path in damaged:
            target = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            with contextlib.suppress(OSError):
                path.rename(target)


def step_of(name: str) -> int:
    """The step in the name of a checkpoint's folder; -1 where there is none. The names themselves
    are in the order of steps only up to step 999,999."""
    number = name.removeprefix("step-")
    return int(number) if number.isascii() and number.isdigit() else -1


def in_order(folder: Path) -> list[Path]:
    """All ``folder/step-…``, oldest first, whatever is in them."""
    return sorted(folder.glob("step-*"), key=lambda path: (step_of(path.name), path.name))


def missing(names: Collection[str]) -> list[str]:
    """The patterns that no name fits."""
    model = ADAPTER if any("adapter/" in name for name in names) else POLICY
    return [pattern for pattern in (*model, *MUST_HAVE) if not fnmatch.filter(names, pattern)]


def manifest_text(step: int, files: Iterable[FileDigest]) -> str:
    ordered = sorted(files, key=lambda file: file.name)
    content = {
        "step": step,
        "files": {file.name: {"sha256": file.sha256, "bytes": file.nbytes} for file in ordered},
    }
    return json_text({**content, "sha256": _own_digest(content)})


def verify_checkpoint(path: Path) -> str | None:
    """None when the manifest is the one that was written, and every file has the size and hash it
    names; else what is wrong."""
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        digest = manifest.pop("sha256")
        # The text, too: a byte that only changes the layout was not written by Accord.
        if digest != _own_digest(manifest) or text != json_text({**manifest, "sha256": digest}):
            return f"{MANIFEST} does not have the hash it states"
        if path.name != f"step-{manifest['step']:06d}":
            return f"{MANIFEST} is of step {manifest['step']}"
        files = [FileDigest(n, e["bytes"], e["sha256"]) for n, e in manifest["files"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        return f"{MANIFEST} is damaged: {problem!r}"
    if lacking := missing([file.name for file in files]):
        return f"{MANIFEST} names no {', '.join(lacking)}"
    return next(filter(None, (_wrong(path, file) for file in files)), None)


def _wrong(folder: Path, expected: FileDigest) -> str | None:
    path, name = folder / expected.name, expected.name
    try:
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected.nbytes:
            return f"{name} has {path.stat().st_size} of {expected.nbytes} bytes"
        return None if digest_of(path, name) == expected else f"{name} has another hash"
    except OSError as problem:
        return f"{name} cannot be read: {problem}"


def _own_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json_text(content).encode()).hexdigest()
