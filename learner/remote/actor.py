"""One process of the learner, as a Ray actor.

torch is imported inside the actor, after its process has its cores and thread count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from cluster.contracts.crash_points import arm
from cluster.contracts.durable import FileDigest
from cluster.contracts.errors import Fatal, Retryable
from cluster.contracts.plugins import install
from cluster.contracts.records import StepInput, StepResult, WeightManifest
from cluster.contracts.stacks import thread_stacks
from cluster.contracts.telemetry import telemetry_off
from cluster.machine.imports import quick_imports
from cluster.machine.parcels import Parcel, unpack
from learner.outbox import Outbox
from learner.settings import NODE_HOST, LearnerSettings, with_files_here

_PAYLOAD_TIMEOUT_S = 120.0
ASIDE = "aside"
"""Ray's concurrency group of what is answered while a step goes on."""
WATCH = "watch"
"""Of the one call that is answered by the process's end."""
STACKS = "stacks"
"""Of what is asked when nothing else may be answered."""
FILES = "files"
"""Of the writing and sending of files."""
AHEAD = "ahead"
"""Of the fetching of what the next step trains on."""
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class LearnerActor:
    """Runs in its own process, the learner's `rank` of several. One call at a time, in order, and
    beside them one call of the group "files"."""

    def __init__(
        self, settings: LearnerSettings, cores: Sequence[int], threads: int, rank: int = 0
    ) -> None:
        if cores and hasattr(os, "sched_setaffinity"):
            for thread in os.listdir("/proc/self/task"):  # Ray's threads run the other methods
                with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                    os.sched_setaffinity(int(thread), set(cores))
        telemetry_off()
        # More threads than cores make small products many times slower, and torch reads this once.
        os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
        if settings.host == NODE_HOST:
            settings = dataclasses.replace(settings, host=ray.util.get_node_ip_address())
        self._settings, self._threads, self._rank = settings, threads, rank
        self._learner: Any = None
        self._ranks: Any = None
        self._place: Any = None
        self._held: StepInput | None = None
        self._ahead: dict[Any, Any] = {}  # reference -> what was fetched for the next step
        self._outbox: Outbox | None = None
        self._snapshot: Any = None

    @ray.method(concurrency_group=WATCH)
    def wait(self) -> None:
        """Returns never: whoever waits learns from Ray when the process dies."""
        threading.Event().wait()

    @ray.method(concurrency_group=ASIDE)
    def pulse(self) -> None:
        """Answers while a step goes on: the process lives and is not stopped."""

    @ray.method(concurrency_group=STACKS)
    def stacks(self) -> str:
        return thread_stacks()

    def pid(self) -> int:
        return os.getpid()

    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    def sees(self, path: str, word: str) -> str | None:
        """Name of a file beside `path` that the driver has to find, where `path` is the file that
        the driver wrote: it holds `word`. None where it is not, or nothing can be written there:
        what this process writes then goes into an outbox."""
        probe = Path(path)
        with contextlib.suppress(OSError):
            if probe.read_text(encoding="utf-8") == word:
                seen = probe.with_name(f"{probe.name}-seen-{self._rank}")
                seen.write_text(word, encoding="utf-8")
                return seen.name
        return None

    def crash_at(self, point: str) -> None:
        arm(point)

    def use_outbox(self) -> None:
        self._outbox = Outbox()
        self._settings = dataclasses.replace(self._settings, run_dir=str(self._outbox.path))

    def open_place(self) -> tuple[str, int]:
        """(host, port) at which the processes of this learner meet; asked of the first one."""
        from learner.compute.ranks import meeting_place

        self._place = meeting_place(self._settings.host, self._settings.learner.start_timeout_s)
        return self._settings.host, self._place.port

    def start(self, place: tuple[str, int] | None = None) -> WeightManifest:
        """place: what `open_place` said, for a learner of several processes."""
        with quick_imports():
            from learner.compute.ranks import SINGLE, join
            from learner.rl.learner import PPOLearner

        self._settings.files.check_host()
        settings, self._ranks = with_files_here(self._settings), SINGLE
        install(settings.plugins)
        if place is not None:
            self._ranks = join(
                self._rank,
                settings.learner.processes,
                self._place or place,
                gpu=settings.learner.gpus > 0,
                timeout_s=settings.learner.step_timeout_s,
                host=settings.host,
            )
        self._learner = PPOLearner(settings, threads=self._threads, ranks=self._ranks)
        return self._learner.start()

    @ray.method(concurrency_group=AHEAD)
    def fetch_ahead(self, payloads: list[Any]) -> None:
        """Fetch while a step computes. What cannot be had is left to the step that needs it."""
        fetched = {}
        with contextlib.suppress(Retryable):
            for payload in payloads:
                if isinstance(payload, list):
                    fetched[payload[0]] = _resolve(payload)
        self._ahead = fetched

    def work_ahead(self, batch: StepInput) -> None:
        """Begin with some groups of the next step, between two steps."""
        with contextlib.suppress(Retryable):  # what cannot be had is left to the step
            fetched = self._fetched(batch)
            named = zip(batch.payloads, fetched.payloads, strict=True)
            self._ahead |= {given[0]: table for given, table in named if isinstance(given, list)}
            self._learner.work_ahead(fetched)

    def hold(self, batch: StepInput) -> None:
        """Fetch what the next `step` trains on. With several processes it is done before: payloads
        that are lost must be known before one process waits for another."""
        self._held = self._fetched(batch)

    def step(self, batch: StepInput | None = None) -> StepResult:
        """batch: None for the one held."""
        wanted, self._held = (self._held if batch is None else self._fetched(batch)), None
        if wanted is None:
            raise Fatal("the learner was asked for a step that it does not hold")
        return self._learner.step(wanted)

    def _fetched(self, batch: StepInput) -> StepInput:
        ahead, self._ahead = self._ahead, {}
        tables = tuple(
            ahead[payload[0]]
            if isinstance(payload, list) and payload[0] in ahead
            else _resolve(payload)
            for payload in batch.payloads
        )
        return dataclasses.replace(batch, payloads=tables)

    def use_checkpoint(self, parcel: Parcel | None, replay: Sequence[Parcel]) -> None:
        """Start from the packed checkpoint and rollouts, which the driver's disk holds."""
        checkpoint = None if parcel is None else str(unpack(parcel))
        files = tuple(str(unpack(file)) for file in replay)
        self._settings = dataclasses.replace(self._settings, resume_from=checkpoint, replay=files)

    def snapshot(self) -> int:
        """Copy this process's share of the state in memory; how many bytes it takes."""
        self._snapshot = self._learner.snapshot()
        nbytes: int = self._snapshot.nbytes
        return nbytes

    @ray.method(concurrency_group=FILES)
    def write_snapshot(self, directory: str) -> tuple[FileDigest, ...]:
        """Write this process's share. directory: below the outbox where there is one."""
        taken, self._snapshot = self._snapshot, None
        if taken is None:
            raise Fatal("the learner was asked to write a checkpoint that it has no copy of")
        root = Path(directory) if self._outbox is None else self._outbox.path / directory
        digests: tuple[FileDigest, ...] = taken.write(root)
        return digests

    @ray.method(concurrency_group=FILES)
    def outbox(self, method: str, *args: Any) -> Any:
        return None if self._outbox is None else getattr(self._outbox, method)(*args)

    def close(self) -> None:
        """Finish writing. What is in the outbox stays until it is closed, too."""
        try:
            if self._learner is not None:
                self._learner.close()
        finally:
            if self._ranks is not None:
                self._ranks.leave()


# Ray's types do not know the option.
_with_groups: Any = ray.remote
_GROUPS = {ASIDE: 1, WATCH: 1, STACKS: 1, FILES: 2, AHEAD: 1}
LearnerActors = _with_groups(concurrency_groups=_GROUPS)(LearnerActor)


def _resolve(payload: Any) -> Any:
    """[reference] -> its Arrow table. A list, because Ray would fetch a bare one for the sender."""
    if not isinstance(payload, list):
        return payload
    try:
        return ray.get(payload[0], timeout=_PAYLOAD_TIMEOUT_S)
    except GetTimeoutError:
        raise Retryable(f"rollouts did not arrive within {_PAYLOAD_TIMEOUT_S:.0f} s") from None
    except RayError as problem:
        raise Retryable(f"rollouts are lost with the worker that held them: {problem}") from None
