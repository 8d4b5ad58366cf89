"""The reward service in a Ray actor of its own (the only file here that knows Ray)."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import math
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray.experimental import internal_kv

from cluster.contracts.actor_names import Names, unnamed
from cluster.contracts.config.reward import RewardConfig, RewardModelSource
from cluster.contracts.errors import AccordError, Fatal, RewardFailure, UserError
from cluster.contracts.plugins import PluginFile, install, loaded
from cluster.contracts.stacks import thread_stacks
from cluster.contracts.telemetry import telemetry_off
from cluster.machine.imports import quick_imports
from cluster.machine.shipment import Shipment, known_as
from reward_service.access import OPEN, Access
from reward_service.client import RewardClient, Unreached
from reward_service.log_follower import LogFollower, whole_lines
from reward_service.source import ServiceInfo
from reward_service.source_paths import add_known_answers, with_absolute_outputs, with_paths

_OWN_LOG = "own"
_LOG_TIMEOUT_S = 5.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class ServicePlace:
    """Where a service will listen that may still be starting; any process of the cluster may ask.

    ``outcome``: one reference to what the actor's start returned, in a list, because Ray would
    fetch a bare one for whoever is handed it, and make that wait.
    """

    outcome: list[Any]
    num_cpus: float
    timeout_s: float

    def wait(self, limit_s: float = math.inf) -> tuple[str, ServiceInfo]:
        """(address, info) once it serves. Raises UserError as raised while loading, or when it
        did not start in time, Fatal when its process died, and RewardFailure after ``limit_s``
        seconds in which it may still have waited for room on the cluster."""
        try:
            outcome = ray.get(self.outcome[0], timeout=min(limit_s, self.timeout_s))
            return self.settled(outcome)
        except (ray.exceptions.RayError, TimeoutError) as problem:
            if isinstance(problem, TimeoutError) and limit_s < self.timeout_s:
                raise RewardFailure(f"no reward service has started within {limit_s:g} s") from None
            raise self.explained(problem) from None

    @staticmethod
    def settled(outcome: tuple[str, ServiceInfo] | UserError) -> tuple[str, ServiceInfo]:
        if isinstance(outcome, UserError):
            raise outcome
        return outcome

    def explained(self, problem: BaseException) -> AccordError:
        if isinstance(problem, ray.exceptions.RayTaskError):
            cause = problem.cause
            if isinstance(cause, AccordError):
                return cause
            return Fatal(f"the reward service failed while it started:\n{problem}")
        if isinstance(problem, TimeoutError):  # Ray's own deadline is one, too
            return UserError(
                f"the reward service did not start within {self.timeout_s:g} s",
                where=f"a Ray actor that asks for {self.num_cpus:g} CPU",
                fix="`ray status` shows whether so many CPUs are free",
            )
        return Fatal(f"the reward service's process died while it started: {problem}")


@dataclass(frozen=True, slots=True)
class AddressBook:
    """Where a run's reward services listen now, under a ``name`` of the run's own. Ray's head keeps
    it, so that any process of the cluster can look it up and none has to be asked."""

    name: str

    def put(self, addresses: Sequence[str]) -> None:
        internal_kv._internal_kv_put(self._key, json.dumps(list(addresses)).encode())

    def read(self) -> list[str]:
        """Empty where nothing was put, or the head does not answer: what is known then still
        holds."""
        try:
            found = internal_kv._internal_kv_get(self._key)
        except Exception:
            return []
        return [str(address) for address in json.loads(found)] if found else []

    @property
    def _key(self) -> bytes:
        return f"accord/rewards/{self.name}".encode()


Begun = tuple[Any, ServicePlace]


class RewardServiceHandle:
    """A service that starts or runs: its ``place`` to give to clients, ``address``, ``stop``."""

    def __init__(self, begin: Callable[[], Begun], log_file: Path | None = None) -> None:
        """``begin``: begins to start the service in a new process. ``log_file``: takes what the
        process prints, where it does not write there itself."""
        self._begin = begin
        self._actor, self.place = begin()
        self._log_file = log_file
        self._log = self._follow_log()
        self._answer: tuple[str, ServiceInfo] | None = None

    def wait(self) -> None:
        """Until it serves. On failure its process is ended; raises as ``ServicePlace.wait``."""
        try:
            self._answer = self.place.wait()
        except BaseException:
            self._end_log()
            ray.kill(self._actor)
            raise

    async def started(self) -> None:
        """As ``wait``, for an event loop; its process is left to ``stop``."""
        future = asyncio.wrap_future(self.place.outcome[0].future())
        try:
            outcome = await asyncio.wait_for(future, self.place.timeout_s)
        except (ray.exceptions.RayError, TimeoutError) as problem:
            raise self.place.explained(problem) from None
        self._answer = self.place.settled(outcome)

    async def restart(self) -> None:
        """Another process in place of one that died. Raises as ``started``."""
        if self._log is not None:
            self._log.close()
        ray.kill(self._actor)
        self._actor, self.place = self._begin()
        self._log = self._follow_log()
        await self.started()

    @property
    def address(self) -> str:
        """Known once it has started."""
        return self._known()[0]

    @property
    def info(self) -> ServiceInfo:
        return self._known()[1]

    def _known(self) -> tuple[str, ServiceInfo]:
        if self._answer is None:
            raise RuntimeError("the reward service has not started yet")
        return self._answer

    async def death(self) -> str:
        """Waits until the process has ended without being asked to; says how."""
        try:
            await asyncio.wrap_future(self._actor.wait.remote().future())
        except ray.exceptions.RayActorError as problem:
            return (str(problem).strip() or type(problem).__name__).splitlines()[0]
        return await asyncio.get_running_loop().create_future()  # it was asked to: nothing to tell

    async def stacks(self) -> str:
        """What the threads of its process do."""
        return str(await asyncio.wrap_future(self._actor.stacks.remote().future()))

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends server, actor and process. Idempotent."""
        if self._actor is None:
            return
        actor, self._actor = self._actor, None
        try:
            if self._answer is not None:  # one that is still starting has nothing to finish
                ray.get(actor.stop.remote(), timeout=timeout_s)
                self._end_log()
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            pass  # dead or stuck: killed below either way
        finally:
            if self._log is not None:
                self._log.close()
            ray.kill(actor)

    def _follow_log(self) -> LogFollower | None:
        if self._log_file is None:
            return None
        actor = self._actor

        def read(offset: int) -> bytes:
            return bytes(ray.get(actor.printed.remote(offset), timeout=_LOG_TIMEOUT_S))

        return LogFollower(read, self._log_file)

    def _end_log(self) -> None:
        """Its last lines tell most of how it ended."""
        if self._log is not None:
            self._log.close()
            # A process that is gone tells nothing more.
            with contextlib.suppress(ray.exceptions.RayError, OSError):
                self._log.collect()


def begin_reward_service(
    cfg: RewardConfig,
    num_cpus: float = 1,
    cores: Sequence[int] = (),
    *,
    reach: Literal["machine", "cluster"] = "machine",
    access: Access = OPEN,
    remote: Mapping[str, Access] | None = None,
    threads: int = 1,
    timeout_s: float = 120.0,
    log_file: Path | None = None,
    files: Shipment | None = None,
    names: Names = unnamed,
) -> RewardServiceHandle:
    """Begin to start the service in a Ray actor, which dies with the driver that started it.

    ``cores``: keep the process to them (Linux). ``reach``: listen on loopback, or on the node's
    address for workers on other machines (needs a token or client certificates). ``log_file``:
    takes what the process prints, such as a reward function's own output, and the traceback of one
    that fails; within some seconds where it may be on another machine. ``files``: what it is sent
    of the files that the sources name.
    """
    kind: Any = ray.remote(_RewardActor)
    options = {
        "num_cpus": num_cpus,
        "num_gpus": cfg.gpus,
        "resources": dict(cfg.resources),
        "max_concurrency": 4,
    }
    if cfg.labels:
        options["label_selector"] = dict(cfg.labels)

    log: str | None = None
    if log_file is not None:
        log = _OWN_LOG if reach == "cluster" else str(log_file.absolute())

    def begin() -> Begun:
        actor = kind.options(**options, **names("reward")).remote(tuple(cores), threads, log)
        outcome = actor.start.remote(
            as_the_command_knows(cfg), reach, access, remote, loaded(), files or Shipment()
        )
        return actor, ServicePlace([outcome], num_cpus, timeout_s)

    return RewardServiceHandle(begin, log_file if log == _OWN_LOG else None)


def start_reward_service(cfg: RewardConfig, *args: Any, **keys: Any) -> RewardServiceHandle:
    """``begin_reward_service``, and wait until it serves. Raises as ``ServicePlace.wait``."""
    handle = begin_reward_service(cfg, *args, **keys)
    handle.wait()
    return handle


@dataclass(frozen=True, slots=True)
class RewardClients:
    """Makes a worker's client in the worker's process, once the service is there. Picklable."""

    service: str | ServicePlace
    deadline_s: float
    access: Access = OPEN
    book: AddressBook | None = None  # of a service that may be started again
    patience_s: float = math.inf  # for a service that has not started yet

    def __call__(self, tokenizer: str) -> RewardClient:
        """``tokenizer``: fingerprint of the one that made the rollouts' token ids."""
        place = self.service
        address = place if isinstance(place, str) else place.wait(self.patience_s)[0]
        client = RewardClient(
            [address],
            deadline_s=self.deadline_s,
            access=self.access,
            tokenizer=tokenizer,
            follow=self.book.read if self.book is not None else None,
        )
        # Away at the moment: a worker that comes back during an outage waits like the others do.
        with contextlib.suppress(Unreached):
            client.connect()
        return client


class _RewardActor:
    def __init__(self, cores: Sequence[int], threads: int, log: str | None) -> None:
        """``log``: a file of this machine, or ``_OWN_LOG``: one that ``printed`` reads."""
        self._log = -1
        if log == _OWN_LOG:
            self._log, path = tempfile.mkstemp(prefix="accord-reward-")
            _write_to(path)
            os.unlink(path)  # the open descriptors keep it; nothing is left when they are closed
        elif log is not None:
            _write_to(log)
        telemetry_off()
        # Before torch or grpc start their threads, which inherit both.
        for variable in THREAD_VARIABLES:
            os.environ[variable] = str(threads)
        if cores and hasattr(os, "sched_setaffinity"):
            for thread in os.listdir("/proc/self/task"):  # Ray's own threads start ours
                with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                    os.sched_setaffinity(int(thread), set(cores))
        self._threads = threads
        self._server: Any = None
        self._stopped = threading.Event()

    def start(
        self,
        cfg: RewardConfig,
        reach: str,
        access: Access,
        remote: Mapping[str, Access] | None,
        plugins: tuple[PluginFile, ...],
        files: Shipment,
    ) -> tuple[str, ServiceInfo] | UserError:
        """Errors of the user are returned, not raised: Ray would wrap and retype them."""
        from reward_service.server import serve

        if any(isinstance(source, RewardModelSource) for source in cfg.sources):
            with quick_imports():  # of torch and transformers, which the model is loaded with
                import reward_service.sources.model  # noqa: F401

        host = "127.0.0.1" if reach == "machine" else str(ray.util.get_node_ip_address())
        try:
            files.check_host()
            install(plugins)
            cfg = as_found_here(cfg, files)
            self._server = serve(cfg, host, 0, access, threads=self._threads, remote=remote)
        except UserError as error:
            return error
        return self._server.address, self._server.info

    def wait(self) -> None:
        """Returns when stopped; whoever waits learns from Ray when the process dies before."""
        self._stopped.wait()

    def stacks(self) -> str:
        return thread_stacks()

    def printed(self, offset: int) -> bytes:
        return whole_lines(self._log, offset)

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
        self._stopped.set()


def _write_to(log_file: str) -> None:
    """From now on, what this process prints and logs goes into the file, line by line."""
    Path(log_file).parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    os.close(file)
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", force=True)
    logging.getLogger("accord.reward").setLevel(logging.DEBUG)


def _changed(cfg: RewardConfig, change: Callable[[Any], Any]) -> RewardConfig:
    return cfg.model_copy(update={"sources": [change(source) for source in cfg.sources]})


def as_the_command_knows(cfg: RewardConfig) -> RewardConfig:
    """Every path as a path of the command, whatever folder the reading process has."""
    return _changed(cfg, lambda one: with_absolute_outputs(with_paths(one, known_as)))


def as_found_here(cfg: RewardConfig, files: Shipment) -> RewardConfig:
    """Every path as the place on this host where the file lies."""
    for source in cfg.sources:
        add_known_answers(source, files.here)
    return _changed(cfg, lambda one: with_paths(one, files.here))
