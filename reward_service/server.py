"""The reward service: a gRPC server around one composition of rewards."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection

from cluster.contracts.config.reward import RewardConfig
from cluster.contracts.errors import AccordError, RewardFailure, Unrated, UserError
from reward_service import wire
from reward_service.access import OPEN, Access, Tls
from reward_service.batching import Coalescer, DeadlinePassed, Job, Overloaded
from reward_service.composition import Composition, build
from reward_service.intake import Intake, Read, return_freed_memory
from reward_service.proto import reward_pb2 as pb
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
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
THREADS = 96  # each waits for its batch, so this bounds the requests that can share one
MAX_CONCURRENT = 512
# A status text travels in the trailers. gRPC refuses some trailers over 8 KiB, all over 16 KiB.
MAX_STATUS_BYTES = 6000
OPTIONS = (
    ("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", wire.MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", 128),  # of one connection
    # A stream that nobody reads yet keeps this much, whatever its sender could send.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 65536),
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
        servicer: _Servicer,
    ) -> None:
        self.address = address
        self.info = info
        self.coalescer = coalescer
        self._server = server
        self._composition = composition
        self._servicer = servicer
        self._stopped = False

    def wait(self, timeout_s: float | None = None) -> None:
        """Until stopped by another thread, or the time is over."""
        self._server.wait_for_termination(timeout_s)

    def stop(self, grace_s: float = 2.0) -> None:
        """Refuse new calls, let running ones end within ``grace_s``, free the port. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        self._servicer.serving = False
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
    return_freed_memory()
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
    server.add_generic_rpc_handlers(servicer.handlers())
    if with_reflection:
        names = (SERVICE, HEALTH, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
    server.start()
    return RunningServer(server, f"{host}:{bound}", info, coalescer, composition, servicer)


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


class _Servicer:
    def __init__(self, coalescer: Coalescer, info: ServiceInfo, longest_s: float) -> None:
        self.serving = True
        self._coalescer = coalescer
        self._info = info
        self._longest_s = longest_s
        self._replies = ReplyCache()
        self._intake = Intake()

    def handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        """Each call has one message. To gRPC it is a stream of one, because of a stream nothing is
        read before the handler asks for it."""
        return (
            grpc.method_handlers_generic_handler(
                SERVICE, {"Score": _one_message(self.score), "GetInfo": _one_message(self.tell)}
            ),
            grpc.method_handlers_generic_handler(HEALTH, {"Check": _one_message(self.check)}),
        )

    def check(self, _: Iterator[bytes], context: Any) -> health_pb2.HealthCheckResponse:
        """Whatever service is named, because the message is never read: anybody may ask this."""
        states = health_pb2.HealthCheckResponse
        return states(status=states.SERVING if self.serving else states.NOT_SERVING)

    def tell(self, _: Iterator[bytes], context: Any) -> pb.GetInfoResponse:
        return wire.encode_info(self._info)

    def score(self, messages: Iterator[bytes], context: Any) -> pb.ScoreResponse:
        try:
            return self._score(messages, context)
        except Exception as error:
            code, text = _status(error)
            if code is Code.INTERNAL:
                log.exception("scoring failed")
            context.abort(code, _fitting(text))
            raise  # abort has raised already

    def _score(self, messages: Iterator[bytes], context: Any) -> pb.ScoreResponse:
        given_s = context.time_remaining()  # None: the caller set no deadline
        left_s = self._longest_s if given_s is None else min(given_s, self._longest_s)
        if left_s <= 0 or not context.is_active():
            raise DeadlinePassed("the deadline passed before the request was read")
        deadline = time.monotonic() + left_s
        read = self._intake.read(messages, context, left_s)
        request_id, ids = read.request_id, [item.id for item in read.items]
        job = self._job(read, deadline)
        del read  # the job has the items for as long as it needs them
        try:
            scores = job.future.result(timeout=max(0.0, deadline - time.monotonic()))
        except FutureTimeout as error:
            if job.future.done():  # the scorer itself timed out
                raise
            raise DeadlinePassed(f"not scored within {left_s:.1f} s") from error
        return wire.encode_reply(request_id, self._info.scorer_version, ids, scores)

    def _job(self, read: Read, deadline: float) -> Job:
        """A new job keeps the room its items take until it is done; any other gives it back."""
        begun: list[Job] = []
        loan = (
            read.loan
        )  # what the job calls when it is done lives on with its reply: not the items

        def start() -> Job:
            begun.append(self._coalescer.submit(read.items, deadline))
            return begun[0]

        try:
            return self._replies.job(read.request_id, read.digest, deadline, start)
        finally:
            if begun:
                begun[0].future.add_done_callback(lambda _: loan.end())
            else:
                loan.end()


def _one_message(behaviour: Any) -> grpc.RpcMethodHandler:
    return grpc.stream_unary_rpc_method_handler(
        behaviour, response_serializer=lambda reply: reply.SerializeToString()
    )


def _fitting(text: str) -> str:
    """The longest beginning of ``text`` that fits in a status.

    gRPC writes a byte outside printable ASCII, and "%", as three bytes ("%E2").
    """
    left = MAX_STATUS_BYTES
    for at, char in enumerate(text):
        plain = " " <= char <= "~" and char != "%"
        left -= 1 if plain else 3 * len(char.encode(errors="replace"))
        if left < 0:
            return text[:at]
    return text


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
    if isinstance(error, Unrated):
        return Code.NOT_FOUND, str(error)
    if isinstance(error, AccordError):
        return Code.FAILED_PRECONDITION, str(error)
    return Code.INTERNAL, f"{type(error).__name__}: {error}"
