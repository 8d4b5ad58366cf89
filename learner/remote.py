"""The learner as Ray actors, one for each of its processes, and the controller's handle of it.

torch is imported inside the actor, after its process has its cores and thread count.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.contracts.actor_names import Names, unnamed
from cluster.contracts.crash_points import arm, take_learners
from cluster.contracts.deadlines import within
from cluster.contracts.durable import FileDigest, write_text
from cluster.contracts.errors import (
    AccordError,
    Fatal,
    LearnerLost,
    NotSaved,
    PeerLost,
    Retryable,
    UserError,
)
from cluster.contracts.plugins import install
from cluster.contracts.records import StepInput, StepResult, WeightManifest
from cluster.contracts.stacks import thread_stacks
from cluster.contracts.telemetry import telemetry_off
from cluster.machine.imports import quick_imports
from cluster.machine.parcels import Parcel, pack, unpack
from learner.outbox import Outbox, copy_files
from learner.settings import NODE_HOST, LearnerSettings, with_files_here
from learner.step_names import StepNames

T = TypeVar("T")

_PAYLOAD_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 130.0
_CHECKPOINT = "checkpoint"  # folder of the outbox
_GRACE_S = 5.0
"""After one process has failed: for the others to meet the same fault by themselves."""
ASIDE = "aside"
"""Ray's concurrency group of what is answered while a step goes on."""
WATCH = "watch"
"""Of the one call that is answered by the process's end."""
STACKS = "stacks"
"""Of what is asked when nothing else may be answered."""
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

    def sees(self, path: str, word: str) -> bool:
        """Whether `path`, which the driver wrote, is the driver's file also here: it holds `word`,
        and what is written beside it here is there for the driver. Where it is not, the files of
        this learner go into an outbox."""
        probe = Path(path)
        with contextlib.suppress(OSError):
            if probe.read_text(encoding="utf-8") == word:
                probe.with_name(f"{probe.name}-seen").write_text(word, encoding="utf-8")
                return True
        return False

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

    def hold(self, batch: StepInput) -> None:
        """Fetch what the next `step` trains on. With several processes it is done before: payloads
        that are lost must be known before one process waits for another."""
        self._held = _fetched(batch)

    def step(self, batch: StepInput | None = None) -> StepResult:
        """batch: None for the one held."""
        wanted, self._held = (self._held if batch is None else _fetched(batch)), None
        if wanted is None:
            raise Fatal("the learner was asked for a step that it does not hold")
        return self._learner.step(wanted)

    def use_checkpoint(self, parcel: Parcel | None, replay: Sequence[Parcel]) -> None:
        """Start from the packed checkpoint and rollouts, which the driver's disk holds."""
        checkpoint = None if parcel is None else str(unpack(parcel))
        files = tuple(str(unpack(file)) for file in replay)
        self._settings = dataclasses.replace(self._settings, resume_from=checkpoint, replay=files)

    def snapshot(self) -> int:
        """Copy the state in memory; how many bytes it takes (on the first rank)."""
        self._snapshot = self._learner.snapshot()
        return self._snapshot.nbytes if self._snapshot is not None else 0

    @ray.method(concurrency_group="files")
    def write_snapshot(self, directory: str) -> tuple[FileDigest, ...]:
        """directory: below the outbox where there is one."""
        taken, self._snapshot = self._snapshot, None
        if taken is None:
            raise Fatal("the learner was asked to write a checkpoint that it has no copy of")
        root = Path(directory) if self._outbox is None else self._outbox.path / directory
        digests: tuple[FileDigest, ...] = taken.write(root)
        return digests

    @ray.method(concurrency_group="files")
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
_GROUPS = {ASIDE: 1, WATCH: 1, STACKS: 1, "files": 2}
_LearnerActors = _with_groups(concurrency_groups=_GROUPS)(LearnerActor)


def _fetched(batch: StepInput) -> StepInput:
    tables = tuple(_resolve(payload) for payload in batch.payloads)
    return dataclasses.replace(batch, payloads=tables)


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


class RayLearner:
    """LearnerHandle of a learner in Ray actors, `learner.processes` of them. Errors of Accord
    arrive as they were raised; when one process fails and not the others, all are ended.

    cores: dealt out to its processes, `threads` to each; empty: they are not pinned. threads: of
    torch, in each process. options: more options of the actors, such as a scheduling strategy.
    room_timeout_s: how long to wait for a place on the cluster, which may still grow. successor:
    (settings of a lost learner, step to go on at) -> those of the one that takes over.
    """

    def __init__(
        self,
        settings: LearnerSettings,
        *,
        cores: Sequence[int] = (),
        threads: int = 1,
        options: dict[str, Any] | None = None,
        names: Names = unnamed,
        room_timeout_s: float = math.inf,
        successor: Callable[[LearnerSettings, int], LearnerSettings] = lambda same, step: same,
    ) -> None:
        self._successor = successor
        self._room_timeout_s = room_timeout_s
        self.nodes: frozenset[str] = frozenset()  # ids of those that its processes run on
        self._group: Any = None  # reserves places near each other for several processes
        self._settings = settings
        self._cores, self._threads = tuple(cores), threads
        self._options = dict(options or {})
        self._names = names
        self._steps = StepNames()
        self._actors: list[Any] = []
        self._started = False
        self._has_outbox = False
        self._copying = asyncio.Lock()  # one file after the other
        self._carrying: asyncio.Task[None] | None = None

    async def start(self, step: int | None = None) -> WeightManifest:
        """Start the processes, load the models, publish. Deadline: `learner.start_timeout_s` from
        the moment at which all processes have their places. The second time, the processes of
        before are ended, and others take over."""
        if self._started:
            self._end()
            self._settings = await asyncio.to_thread(self._successor, self._settings, step or 0)
        learner = self._settings.learner
        self._actors = [
            _LearnerActors.options(**options, **self._named(rank)).remote(
                self._settings, self._cores_of(rank), self._threads, rank
            )
            for rank, options in enumerate(self._places())
        ]
        await self._call("pid", self._room_timeout_s, "to find room on the cluster", together=False)
        homes = [asyncio.wrap_future(actor.node.remote().future()) for actor in self._actors]
        self.nodes = frozenset(await asyncio.gather(*homes))
        limit, purpose = learner.start_timeout_s, "to load its models"
        await self._bridge_hosts(limit)
        if (crash_point := take_learners()) is not None:
            await self._call("crash_at", limit, "to arm a crash point", crash_point)
        place = () if learner.processes == 1 else (await self._first("open_place", limit, purpose),)
        manifest: WeightManifest = await self._call("start", limit, purpose, *place)
        self._started = True
        return manifest

    async def lost(self) -> None:
        """Waits until one of its processes has ended without being asked to; raises LearnerLost."""
        ends = [asyncio.wrap_future(actor.wait.remote().future()) for actor in self._actors]
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            problem = done.pop().exception()
            raise LearnerLost(f"the learner's process died: {problem}")
        finally:
            for end in ends:
                end.cancel()

    async def step(self, batch: StepInput) -> StepResult:
        """One learner step. Deadline: `learner.step_timeout_s`. Raises Retryable when a payload is
        gone with its worker: the step has then changed nothing and may be asked for again."""
        limit, purpose = self._settings.learner.step_timeout_s, f"for step {batch.step}"
        wanted: StepInput | None = batch
        if len(self._actors) > 1:
            await self._call("hold", limit, f"to fetch step {batch.step}", batch, together=False)
            wanted = None
        name = self._steps.of(batch.step)
        result: StepResult = await self._call("step", limit, purpose, wanted, task=name)
        self._steps.done(result)
        not_carried = self._carry_rollouts()
        return dataclasses.replace(result, not_written=(*result.not_written, *not_carried))

    async def pulse(self) -> None:
        """Returns when every process has answered. Raises Retryable when one is gone."""
        if not self._actors:
            raise Retryable("the learner has no process yet")
        try:
            await asyncio.gather(
                *(asyncio.wrap_future(actor.pulse.remote().future()) for actor in self._actors)
            )
        except RayError as problem:
            raise Retryable(f"the learner does not answer: {problem}") from None

    async def stacks(self) -> str:
        """What the threads of its processes do."""
        asked = [asyncio.wrap_future(actor.stacks.remote().future()) for actor in self._actors]
        return "\n".join(await asyncio.gather(*asked)) or "has no process"

    async def snapshot(self) -> int:
        """Copy the state in the learner's memory, after the step before; bytes of the copy."""
        limit = self._settings.learner.step_timeout_s
        nbytes: int = await self._call("snapshot", limit, "to copy its state")
        return nbytes

    async def store(self, directory: str) -> tuple[FileDigest, ...]:
        """Write the copy that `snapshot` made below `directory` of this host, while steps go on.

        Raises NotSaved where a disk does not take it.
        """
        limit = self._settings.learner.step_timeout_s
        place = _CHECKPOINT if self._has_outbox else directory
        try:
            files = await self._ask_for_files("write_snapshot", limit, place)
            if self._has_outbox:
                await self._copy(files, Path(directory), _CHECKPOINT)
                await self._bring_rollouts()
        except OSError as problem:
            raise NotSaved(f"{directory}: {problem}") from problem
        finally:
            if self._has_outbox and self._actors:
                self._actors[0].outbox.remote("remove", _CHECKPOINT)
        stored: tuple[FileDigest, ...] = files
        return stored

    async def stop(self) -> None:
        """Let it finish writing, then end its processes. Raises what the last writing met.

        One that is still starting has written nothing, and would answer only when it has started.
        """
        try:
            if self._actors and self._started:
                await self._call("close", _STOP_TIMEOUT_S, "to finish writing")
                try:
                    await self._bring_rollouts()
                except OSError as problem:
                    raise Fatal(f"the last rollouts could not be written: {problem}") from problem
                await self._ask_for_files("outbox", _STOP_TIMEOUT_S, "close")
        finally:
            if self._carrying is not None:
                self._carrying.cancel()
            self._end()

    def _places(self) -> list[dict[str, Any]]:
        """Options of each process. Several share one placement group, so that all of them get a
        place or none, on as few machines as possible."""
        learner = self._settings.learner
        common: dict[str, Any] = {"num_cpus": learner.cpus, "num_gpus": learner.gpus}
        common |= {"resources": dict(learner.resources), "max_restarts": 0, **self._options}
        labels = dict(learner.labels)
        if learner.processes == 1:
            return [common | ({"label_selector": labels} if labels else {})]
        asked = {"CPU": learner.cpus, "GPU": learner.gpus, **learner.resources}
        bundle = {kind: amount for kind, amount in asked.items() if amount > 0}
        self._group = placement_group(
            [bundle] * learner.processes,
            strategy="PACK",
            bundle_label_selector=[labels] * learner.processes if labels else None,
        )
        return [
            common | {"scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, rank)}
            for rank in range(learner.processes)
        ]

    # -- files of a learner on another host -------------------------------------------------------

    async def _bridge_hosts(self, limit: float) -> None:
        """Give the processes what they do not see of the run directory: an outbox to the first,
        which writes, and the checkpoint that a resumed run starts from to all."""
        sees = await self._see_run_directory(limit)
        self._has_outbox = not sees[0]
        if self._has_outbox:
            if self._settings.weights.transport == "disk":
                raise UserError(
                    "the learner's host does not see the run directory, through which weights "
                    "would go",
                    where="weights.transport = disk",
                    fix="set weights.transport = 'object_store', or run.dir to a shared directory",
                )
            await self._first("use_outbox", limit, "to make its outbox")
        checkpoint, replay = self._settings.resume_from, self._settings.replay
        if (checkpoint is not None or replay) and not all(sees):
            parcel = None
            if checkpoint is not None:
                parcel = await asyncio.to_thread(pack, Path(checkpoint))
            files = [await asyncio.to_thread(pack, Path(file)) for file in replay]
            await self._call("use_checkpoint", limit, "to fetch its checkpoint", parcel, files)

    async def _see_run_directory(self, limit: float) -> list[bool]:
        """Of each process, whether it and this one see the same run directory."""
        if self._settings.run_dir is None:
            return [True for _ in self._actors]  # nothing will be written
        word = secrets.token_hex(16)
        probe = Path(self._settings.run_dir) / f".probe-{word}"
        seen = probe.with_name(f"{probe.name}-seen")
        try:
            write_text(probe, word)
            purpose = "to look at the run directory"
            theirs = await self._ask(self._actors, "sees", limit, purpose, str(probe), word)
            here = seen.is_file() and seen.read_text(encoding="utf-8") == word
            return [here and bool(answer) for answer in theirs]
        finally:
            probe.unlink(missing_ok=True)
            seen.unlink(missing_ok=True)

    def _carry_rollouts(self) -> tuple[str, ...]:
        """Begin to copy what the learner has finished to write; the next step need not wait.
        Returns what kept the last such copying from its end. What is left is tried again now."""
        if not self._has_outbox or (self._carrying is not None and not self._carrying.done()):
            return ()
        before, self._carrying = self._carrying, asyncio.ensure_future(self._bring_rollouts())
        # Looked at by the next call, or, of the last one, never.
        self._carrying.add_done_callback(lambda task: task.cancelled() or task.exception())
        problem = before.exception() if before is not None and not before.cancelled() else None
        return () if problem is None else (f"{self._settings.run_dir}: {problem}",)

    async def _bring_rollouts(self) -> None:
        if not self._has_outbox:
            return
        async with self._copying:
            files = await self._ask_for_files("outbox", _PAYLOAD_TIMEOUT_S, "rollouts")
            for file in files:
                await self._copy([file], Path(str(self._settings.run_dir)))
                # Only now: what could not be written here is tried again after the next step.
                await self._ask_for_files("outbox", _PAYLOAD_TIMEOUT_S, "remove", file.name)

    async def _ask_for_files(self, method: str, limit_s: float, *args: Any) -> Any:
        """As `_first`, of what goes on beside the steps: one that takes too long is no reason to
        end the learner. Raises TimeoutError."""
        if not self._actors:
            raise Fatal(f"the learner was asked to {method} but is not running")
        answer = getattr(self._actors[0], method).remote(*args)
        try:
            return await within(limit_s, asyncio.wrap_future(answer.future()))
        except TimeoutError:
            raise TimeoutError(f"the learner did not {method} within {limit_s:.0f} s") from None
        except RayError as problem:
            raise _named(problem, method) from None

    async def _copy(self, files: Sequence[FileDigest], target: Path, below: str = "") -> None:
        actor = self._actors[0]

        def ask(name: str, offset: int) -> Any:
            return actor.outbox.remote("read", name, offset).future()

        try:
            await asyncio.to_thread(copy_files, ask, files, target, below)
        except RayTaskError as problem:
            raise OSError(f"the learner's host could not read a file: {problem.cause}") from problem
        except RayError as problem:
            raise _named(problem, "send its files") from None

    def _named(self, rank: int) -> dict[str, str]:
        return self._names(f"learner-{rank}" if rank else "learner")

    def _cores_of(self, rank: int) -> tuple[int, ...]:
        own = self._cores[rank * self._threads : (rank + 1) * self._threads]
        return own or self._cores  # fewer cores than processes: they share them all

    async def _first(self, method: str, limit_s: float, purpose: str, *args: Any) -> Any:
        """As `_call`, of the first process alone."""
        if not self._actors:
            raise LearnerLost(f"the learner was asked to {method} but is not running")
        return (await self._ask(self._actors[:1], method, limit_s, purpose, *args))[0]

    async def _call(
        self,
        method: str,
        limit_s: float,
        purpose: str,
        *args: Any,
        together: bool = True,
        task: str = "",
    ) -> Any:
        """What the first process answers, once all have.

        together: they work on it together, so that one that fails leaves the others waiting. task:
        its name in Ray's dashboard.
        """
        if not self._actors:
            raise LearnerLost(f"the learner was asked to {method} but is not running")
        answers = await self._ask(
            self._actors, method, limit_s, purpose, *args, together=together, task=task
        )
        return answers[0]

    async def _ask(
        self,
        actors: list[Any],
        method: str,
        limit_s: float,
        purpose: str,
        *args: Any,
        together: bool = True,
        task: str = "",
    ) -> list[Any]:
        named = {"name": task} if task else {}
        answers = [
            asyncio.wrap_future(getattr(actor, method).options(**named).remote(*args).future())
            for actor in actors
        ]
        try:
            until = asyncio.FIRST_EXCEPTION if together else asyncio.ALL_COMPLETED
            done, waiting = await asyncio.wait(answers, timeout=limit_s, return_when=until)
            if waiting and together and any(answer.exception() for answer in done):
                done, waiting = await asyncio.wait(answers, timeout=_GRACE_S)
            problems = [p for answer in done if (p := answer.exception()) is not None]
            # What nobody raised on purpose may have left the weights half changed.
            unfit = any(isinstance(_named(problem, method), LearnerLost) for problem in problems)
            if waiting or unfit or (together and 0 < len(problems) < len(answers)):
                self._end()
            if problems:
                raise _named(_worst(problems), method) from None
            if waiting:
                raise LearnerLost(f"waited {limit_s:.0f} s for the learner {purpose}; it was ended")
            return [answer.result() for answer in answers]
        finally:
            for answer in answers:
                answer.cancel()

    def _end(self) -> None:
        actors, self._actors = self._actors, []
        for actor in actors:
            ray.kill(actor, no_restart=True)
        if self._group is not None:
            group, self._group = self._group, None
            remove_placement_group(group)


def _worst(problems: Sequence[BaseException]) -> BaseException:
    """The one of several that says most: what a process could not do with the others (a plain
    fault of a collective among them) follows from what happened to one of those."""

    def rank(problem: BaseException) -> int:
        if isinstance(problem, RayTaskError):
            cause = problem.cause
            return 0 if isinstance(cause, AccordError) and not isinstance(cause, PeerLost) else 2
        return 1

    return min(problems, key=rank)


def _named(problem: BaseException, method: str) -> BaseException:
    if isinstance(problem, RayTaskError):
        return _original(problem, method)
    if isinstance(problem, RayActorError):
        return LearnerLost(f"the learner's process died while asked to {method}: {problem}")
    if isinstance(problem, RayError):
        return LearnerLost(f"Ray lost the learner's answer to {method}: {problem}")
    return problem


def _original(problem: RayTaskError, method: str) -> AccordError:
    """What the learner raised, not what Ray made of it."""
    if isinstance(problem.cause, AccordError):
        return problem.cause
    # Its text is the traceback; its other attributes are those of the cause.
    return LearnerLost(f"the learner failed in {method}:\n{problem}")
