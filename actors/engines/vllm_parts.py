"""Weight updates of a vLLM engine that is divided over several processes (tensor parallelism).

Each process stages its own part, beside generation: vLLM's message queue carries the order to begin
and questions how far it is, never a tensor and never a long wait.

    transport that any process can read      each process fetches the update itself
    any other                                this process fetches it once and lays each bucket into
                                             memory that all of them map, two buckets at a time
"""

from __future__ import annotations

import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actors.engines.host_tensors import Shapes, checked
from actors.engines.vllm_weights import WeightStage
from cluster.contracts.errors import AccordError, Fatal, Retryable, WeightMismatch
from cluster.contracts.records import TensorEntry
from cluster.weights.device_buffer import layout, mixed_sums, pack, unpack
from cluster.weights.intake import Incoming, Intake, Source
from cluster.weights.transports import make_receiver

CALL_S = 120.0  # none of the calls computes; one that takes longer has no process to answer it
POLL_S = 0.01
BUCKET_BYTES = 64 << 20
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 (made there under a name of its own)
Tensors = Iterator[tuple[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Progress:
    """Of one process. loaded: buckets it is done with. result: of work that has ended.
    problem: what was raised: the name of the error's class, and its message."""

    loaded: int
    ended: bool
    result: Any = None
    problem: tuple[str, str] | None = None


class PartStage(WeightStage):
    """What vLLM adds to its worker class, in each process of a divided engine."""

    device: Any
    _accord_work: _Beside | None = None

    def accord_begin(self, source: Source | None, shapes: Shapes) -> None:
        """Begin to stage an update. source: where to fetch it; None: its buckets are to come."""
        work = _Beside(self._accord_work)
        tensors: Iterable[tuple[str, Any]] = work.tensors()
        if source is not None:
            tensors = self._accord_intake(source).take(source.manifest)
        work.begin(lambda: self._accord_shadow.stage(checked(shapes, tensors)))
        self._accord_work = work

    def accord_bucket(self, path: str, entries: list[TensorEntry]) -> None:
        self._accord_current.buckets.put((path, entries))

    def accord_end(self, whole: bool) -> None:
        """No bucket follows. whole: all have come; else what was staged is given up."""
        self._accord_current.buckets.put(None if whole else _GIVEN_UP)

    def accord_prove(self) -> None:
        """Begin to compare what is in force with what was staged."""
        self._accord_work = work = _Beside(self._accord_work)
        work.begin(self.accord_wrong)

    def accord_progress(self) -> Progress:
        return self._accord_current.progress()

    @property
    def _accord_current(self) -> _Beside:
        if self._accord_work is None:
            raise Fatal("this process of the engine was not asked to stage anything")
        return self._accord_work

    def _accord_intake(self, source: Source) -> Intake:
        """One a transport, kept: some hold a connection."""
        held = vars(self).setdefault("_accord_intakes", {})
        word = source.manifest.transport
        if word not in held:
            held[word] = Intake(make_receiver(word, str(self.device)), source.timeout_s)
        intake: Intake = held[word]
        return intake


_GIVEN_UP: tuple[str, list[TensorEntry]] = ("", [])


class _Beside:
    """Work on a thread of its own, while vLLM's loop computes and answers.

    before: what has to end first, for it uses the same second set of weights.
    """

    def __init__(self, before: _Beside | None) -> None:
        self._before = before
        self.buckets: queue.SimpleQueue[tuple[str, list[TensorEntry]] | None] = queue.SimpleQueue()
        self._loaded = 0
        self._ended = threading.Event()
        self._result: Any = None
        self._problem: tuple[str, str] | None = None

    def begin(self, work: Callable[[], Any]) -> None:
        threading.Thread(target=self._run, args=(work,), name="weights", daemon=True).start()

    def progress(self) -> Progress:
        ended = self._ended.is_set()  # first: what it is asked of is set before
        return Progress(self._loaded, ended, self._result, self._problem)

    def tensors(self) -> Tensors:
        """Of the buckets that are put; each is let go of before it counts as loaded."""
        while (bucket := self.buckets.get()) is not None:
            if bucket == _GIVEN_UP:
                raise Retryable("the update was given up")
            yield from _read(*bucket)
            self._loaded += 1

    def _run(self, work: Callable[[], Any]) -> None:
        if self._before is not None:
            self._before._ended.wait()
            self._before = None  # or all of them would be kept
        try:
            self._result = work()
        except BaseException as problem:
            self._problem = (type(problem).__name__, str(problem))
        self._ended.set()


class Parts:
    """The processes of a divided engine, as the one that leads them sees them.

    call: asks a method of all of them; it may be used while another thread has the engine step.
    """

    def __init__(self, call: Callable[[str, tuple[Any, ...]], list[Any]]) -> None:
        self._call = call

    def stage(self, shapes: Shapes, tensors: Iterable[tuple[str, Any]]) -> None:
        """Returns when every process has loaded and packed its part. Raises WeightMismatch for an
        update that does not fit, Retryable for one that did not come."""
        if isinstance(tensors, Incoming) and tensors.source is not None:
            self._call("accord_begin", (tensors.source, shapes))
            self._wait()
            tensors.taken_elsewhere()
            return
        with tempfile.TemporaryDirectory(prefix="accord-", dir=_shared_memory()) as folder:
            self._call("accord_begin", (None, shapes))
            whole = False
            try:
                self._lay_out(Path(folder), checked(shapes, tensors))
                whole = True
            finally:
                self._call("accord_end", (whole,))
            self._wait()

    def wrong(self) -> list[str]:
        """Names of the tensors in force, in any of the processes, that were not staged last."""
        self._call("accord_prove", ())
        return sorted({name for part in self._wait() for name in part.result})

    def _lay_out(self, folder: Path, tensors: Tensors) -> None:
        for number, bucket in enumerate(_gathered(tensors)):
            path = folder / f"{number:05d}"
            entries = _write(path, bucket)
            del bucket
            self._call("accord_bucket", (str(path), entries))
            self._wait(loaded=number)  # the one before this one: two exist at a time
            if number:
                (folder / f"{number - 1:05d}").unlink()

    def _wait(self, loaded: int | None = None) -> list[Progress]:
        """Until each process has loaded so many buckets, or ended its work."""
        while True:
            found: list[Progress] = self._call("accord_progress", ())
            for part in found:
                if part.problem is not None:
                    _raise(*part.problem)
            if all(part.ended or (loaded is not None and part.loaded >= loaded) for part in found):
                return found
            time.sleep(POLL_S)


def _raise(kind: str, message: str) -> None:
    """What a process met, as the error that it was there."""
    kinds: dict[str, type[AccordError]] = {"WeightMismatch": WeightMismatch, "Retryable": Retryable}
    raise kinds.get(kind, Fatal)(message)


def _gathered(tensors: Tensors) -> Iterator[dict[str, torch.Tensor]]:
    bucket: dict[str, torch.Tensor] = {}
    used = 0
    for name, tensor in tensors:
        if bucket and used + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, used = {}, 0
        # Copied: what comes may be gone when the next tensor is asked for.
        bucket[name] = tensor.to("cpu", copy=True)
        used += tensor.nbytes
    if bucket:
        yield bucket


def _write(path: Path, bucket: dict[str, torch.Tensor]) -> list[TensorEntry]:
    """Lay a bucket into a file that is mapped, with checksums."""
    _, total = layout(tensor.nbytes for tensor in bucket.values())
    pack(bucket, torch.from_file(str(path), shared=True, size=total, dtype=torch.uint8))
    return [
        TensorEntry(
            name=name,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            nbytes=tensor.nbytes,
            checksum=checksum,
        )
        for (name, tensor), checksum in zip(
            bucket.items(), mixed_sums(bucket.values()), strict=True
        )
    ]


def _read(path: str, entries: list[TensorEntry]) -> Tensors:
    _, total = layout(entry.nbytes for entry in entries)
    tensors = unpack(torch.from_file(path, shared=True, size=total, dtype=torch.uint8), entries)
    found = mixed_sums(tensors.values())
    for entry, checksum in zip(entries, found, strict=True):
        if entry.checksum != checksum:
            raise WeightMismatch(f"tensor {entry.name!r} was torn between two processes")
    yield from tensors.items()


def _shared_memory() -> str | None:
    """A folder in memory where there is one; else the usual temporary one."""
    return _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None
