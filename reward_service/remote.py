"""The reward service in a Ray actor of its own (the only file here that knows Ray)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import ray

from cluster.contracts.config.reward import RewardConfig
from cluster.contracts.errors import UserError
from cluster.contracts.plugins import PluginFile, install, loaded
from reward_service.security import TlsFiles
from reward_service.source import ServiceInfo

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class RewardServiceHandle:
    """A running service: ``address`` to give to clients, ``info``, and ``stop``."""

    def __init__(self, actor: Any, address: str, info: ServiceInfo) -> None:
        self._actor: Any = actor
        self.address = address
        self.info = info

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends server, actor and process. Idempotent."""
        if self._actor is None:
            return
        actor, self._actor = self._actor, None
        try:
            ray.get(actor.stop.remote(), timeout=timeout_s)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            pass  # dead or stuck: killed below either way
        finally:
            ray.kill(actor)


def start_reward_service(
    cfg: RewardConfig,
    num_cpus: float = 1,
    cores: Sequence[int] = (),
    *,
    reach: Literal["machine", "cluster"] = "machine",
    token: str | None = None,
    tls: TlsFiles | None = None,
    remote_token: str | None = None,
    threads: int = 1,
    timeout_s: float = 120.0,
) -> RewardServiceHandle:
    """Start the service in a Ray actor, which dies with the driver that started it.

    ``cores``: keep the process to them (Linux). ``reach``: listen on loopback, or on the node's
    address for workers on other machines (needs a token or client certificates). Raises UserError,
    as raised while loading, or when Ray gave the actor no CPU or it did not start in ``timeout_s``.
    """
    kind: Any = ray.remote(_RewardActor)
    actor = kind.options(num_cpus=num_cpus, max_concurrency=2).remote(tuple(cores), threads)
    try:
        outcome = ray.get(
            actor.start.remote(_absolute(cfg), reach, token, tls, remote_token, loaded()),
            timeout=timeout_s,
        )
    except ray.exceptions.GetTimeoutError as error:
        ray.kill(actor)
        raise UserError(
            f"the reward service did not start within {timeout_s:g} s",
            where=f"a Ray actor that asks for {num_cpus:g} CPU",
            fix="`ray status` shows whether so many CPUs are free",
        ) from error
    except BaseException:
        ray.kill(actor)
        raise
    if isinstance(outcome, UserError):
        ray.kill(actor)
        raise outcome
    address, info = outcome
    return RewardServiceHandle(actor, address, info)


class _RewardActor:
    def __init__(self, cores: Sequence[int], threads: int) -> None:
        # Before torch or grpc start their threads, which inherit both.
        for variable in THREAD_VARIABLES:
            os.environ[variable] = str(threads)
        if cores and hasattr(os, "sched_setaffinity"):
            for thread in os.listdir("/proc/self/task"):  # Ray's own threads start ours
                with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                    os.sched_setaffinity(int(thread), set(cores))
        self._threads = threads
        self._server: Any = None

    def start(
        self,
        cfg: RewardConfig,
        reach: str,
        token: str | None,
        tls: TlsFiles | None,
        remote_token: str | None,
        plugins: tuple[PluginFile, ...],
    ) -> tuple[str, ServiceInfo] | UserError:
        """Errors of the user are returned, not raised: Ray would wrap and retype them."""
        from reward_service.server import serve

        host = "127.0.0.1" if reach == "machine" else str(ray.util.get_node_ip_address())
        try:
            install(plugins)
            self._server = serve(
                cfg, host, 0, token, tls, threads=self._threads, remote_token=remote_token
            )
        except UserError as error:
            return error
        return self._server.address, self._server.info

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()


def _absolute(cfg: RewardConfig) -> RewardConfig:
    """Paths as seen from here: the actor may have another working directory."""
    sources = []
    for source in cfg.sources:
        path = getattr(source, "path", None)
        absolute = str(Path(path).expanduser().absolute()) if path else None
        sources.append(source.model_copy(update={"path": absolute}) if absolute else source)
    return cfg.model_copy(update={"sources": sources})
