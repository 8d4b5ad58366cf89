"""The reward service: a gRPC server around one composition of rewards."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.contracts.config.reward import RewardConfig
from cluster.contracts.errors import AccordError, RewardFailure, UserError
from reward_service import wire
from reward_service.access import OPEN, Access, Tls
from reward_service.batching import Coalescer, DeadlinePassed, Overloaded
from reward_service.composition import Composition, build
from reward_service.proto import reward_pb2 as pb
from reward_service.proto import reward_pb2_grpc
from reward_service.reply_cache import ReplyCache, RequestMismatch
from reward_service.security import (
    TokenInterceptor,
    is_loopback,
    require_safe,
    server_credentials,
)
from reward_service.source import ServiceInfo

log = logging.getLogger("accord.reward")

SERVICE = pb.DESCRIPTOR.services_by_name["RewardService"].full_name
THREADS = 96  # each waits for its batch, so this bounds the requests that can share one
MAX_CONCURRENT = 512
MAX_ERROR_CHARS = 1500  # status texts travel in headers, which gRPC limits to 8 KiB
OPTIONS = (
    ("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", wire.MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a port in use must be an error, not a second server on it
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
)
Code = grpc.StatusCode


class RunningServer:
    """A server that listens at ``address``; ``stop`` ends it, its thread and its sources."""

    def __init__(
        self,
        server: grpc.Server,
        address: str,
        info: ServiceInfo,
        coalescer: Coalescer,
        composition: Composition,
        healthy: health.HealthServicer,
    ) -> None:
        self.address = address
        self.info = info
        self.coalescer = coalescer
        self._server = server
        self._composition = composition
        self._healthy = healthy
        self._stopped = False

    def wait(self, timeout_s: float | None = None) -> None:
        """Until stopped by another thread, or the time is over."""
        self._server.wait_for_termination(timeout_s)

    def stop(self, grace_s: float = 2.0) -> None:
        """Refuse new calls, let running ones end within ``grace_s``, free the port. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        self._healthy.enter_graceful_shutdown()
        self._server.stop(grace_s).wait(grace_s + 5.0)
        if not self.coalescer.close():
            log.warning("the reward service at %s stopped while still scoring", self.address)
        self._composition.close()

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def serve(
    cfg: RewardConfig,
    host: str = "127.0.0.1",
    port: int = 0,
    access: Access = OPEN,
    *,
    threads: int = 1,
    remote: Mapping[str, Access] | None = None,
    with_reflection: bool = False,
) -> RunningServer:
    """Load the rewards of ``cfg`` and serve them; port 0 lets the system choose.

    ``threads``: compute threads of a reward model. ``remote``: what lets the sources of type grpc
    in, by name (None: read here, from files and environment).
    Raises UserError: a source that cannot be loaded, a port in use, a host open to a network
    without a token or client certificates.
    """
    require_safe(host, access)
    composition = build(cfg, threads=threads, remote=remote)
    try:
        return serve_composition(
            composition, cfg, host, port, access, with_reflection=with_reflection
        )
    except BaseException:
        composition.close()
        raise


def serve_composition(
    composition: Composition,
    cfg: RewardConfig,
    host: str = "127.0.0.1",
    port: int = 0,
    access: Access = OPEN,
    *,
    with_reflection: bool = False,
) -> RunningServer:
    """As ``serve``, for rewards that are loaded already; stopping the server closes them."""
    require_safe(host, access)
    server = grpc.server(
        ThreadPoolExecutor(THREADS, thread_name_prefix="accord-reward"),
        interceptors=[TokenInterceptor(access.token)] if access.token else [],
        options=OPTIONS,
        maximum_concurrent_rpcs=MAX_CONCURRENT,
    )
    bound = _bind(server, host, port, access.tls)
    if access.token and access.tls is None and not is_loopback(host):
        log.warning("the reward service at %s:%d talks unencrypted: use TLS", host, bound)
    coalescer = Coalescer(
        composition.score, max_batch=cfg.max_batch, max_wait_s=cfg.max_wait_ms / 1000
    )
    info = composition.info(cfg.max_batch)
    servicer = _Servicer(coalescer, info, cfg.deadline_s)
    reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, server)
    healthy = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    healthy.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    if with_reflection:
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
    server.start()
    return RunningServer(server, f"{host}:{bound}", info, coalescer, composition, healthy)


def _bind(server: grpc.Server, host: str, port: int, tls: Tls | None) -> int:
    address = f"{host}:{port}"
    credentials = server_credentials(tls) if tls is not None else None
    try:
        if credentials is not None:
            return int(server.add_secure_port(address, credentials))
        return int(server.add_insecure_port(address))
    except RuntimeError as error:
        raise UserError(
            "cannot listen there: the port is in use, or the host is not one of this machine",
            where=address,
            fix="stop what listens there, or choose another port (0: any free one)",
        ) from error


class _Servicer(reward_pb2_grpc.RewardServiceServicer):
    def __init__(self, coalescer: Coalescer, info: ServiceInfo, longest_s: float) -> None:
        self._coalescer = coalescer
        self._info = info
        self._longest_s = longest_s
        self._replies = ReplyCache()

    def GetInfo(self, request: pb.GetInfoRequest, context: Any) -> pb.GetInfoResponse:
        return wire.encode_info(self._info)

    def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:
        try:
            return self._score(request, context)
        except Exception as error:
            code, text = _status(error)
            if code is Code.INTERNAL:
                log.exception("scoring failed")
            context.abort(code, text[:MAX_ERROR_CHARS])
            raise  # abort has raised already

    def _score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:
        left_s = min(context.time_remaining(), self._longest_s)
        if left_s <= 0 or not context.is_active():
            raise DeadlinePassed("the deadline passed before the request was read")
        items = wire.decode_request(request)
        deadline = time.monotonic() + left_s
        digest = hashlib.sha256(request.SerializeToString(deterministic=True)).digest()
        job = self._replies.job(
            request.request_id, digest, deadline, lambda: self._coalescer.submit(items, deadline)
        )
        try:
            scores = job.future.result(timeout=left_s)
        except FutureTimeout as error:
            if job.future.done():  # the scorer itself timed out
                raise
            raise DeadlinePassed(f"not scored within {left_s:.1f} s") from error
        ids = [item.id for item in items]
        return wire.encode_reply(request.request_id, self._info.scorer_version, ids, scores)


def _status(error: Exception) -> tuple[Any, str]:
    """What the client is told; which codes it may try again is written in reward.proto."""
    if isinstance(error, wire.BadRequest | RequestMismatch):
        return Code.INVALID_ARGUMENT, str(error)
    if isinstance(error, DeadlinePassed):
        return Code.DEADLINE_EXCEEDED, str(error)
    if isinstance(error, Overloaded):
        return Code.RESOURCE_EXHAUSTED, str(error)
    if isinstance(error, RewardFailure):
        return Code.UNAVAILABLE, str(error)
    if isinstance(error, AccordError):
        return Code.FAILED_PRECONDITION, str(error)
    return Code.INTERNAL, f"{type(error).__name__}: {error}"
