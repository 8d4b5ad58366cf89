"""The rollout worker's side of the reward service."""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import grpc
import tenacity
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.contracts.errors import BadReward, RewardFailure, Unrated, UserError
from cluster.contracts.records import Rollout, Score
from reward_service import wire
from reward_service.access import OPEN, Access, Tls
from reward_service.proto import reward_pb2 as pb
from reward_service.proto import reward_pb2_grpc
from reward_service.security import channel, is_loopback, why_not_connected
from reward_service.source import ScoreItem, ServiceInfo

Code = grpc.StatusCode
AGAIN = (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED)
SCORERS = {Code.FAILED_PRECONDITION: BadReward, Code.NOT_FOUND: Unrated}
USERS = (Code.INVALID_ARGUMENT, Code.UNAUTHENTICATED, Code.UNIMPLEMENTED)
ATTEMPT_SHARE = 1 / 3  # of the deadline, for one attempt: a hung service leaves time to ask another
SHORTEST_ATTEMPT_S = 1.0
LOOK_UP_S = 5.0  # how often it is looked up where the replicas are, by who knows where to look
MAX_CAUSES = 3
LAST_WORDS_S = 2.0
OPTIONS = (
    ("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", wire.MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_retries", 0),  # retries are ours: same request id, one deadline over all
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)


class _Target:
    """One address: its channel, and how many of our calls it is working on."""

    def __init__(self, address: str, tls: Tls | None) -> None:
        self.address = address
        self.busy = 0
        self.channel = channel(address, tls, OPTIONS)
        self.rewards = reward_pb2_grpc.RewardServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)


@dataclass(slots=True)
class _Call:
    """One call over all its attempts: when it must end, and what failed so far and why."""

    end: float
    failed: set[str] = field(default_factory=set)
    causes: list[str] = field(default_factory=list)

    def note(self, address: str, error: Any) -> None:
        self.failed.add(address)
        cause = f"{_code(error).name}: {error.details()}"
        if cause not in self.causes:
            self.causes.append(cause)


class RewardClient:
    """Scores rollouts at one or several replicas of a service (``Scorer``). Thread-safe.

    ``deadline_s`` bounds a call, retries included. ``tokenizer`` is the fingerprint of the policy's
    tokenizer: a reward model with the same one scores the token ids as they are. ``version`` is ""
    until connected, then pinned: another scorer's answer is a BadReward.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        deadline_s: float = 30.0,
        access: Access = OPEN,
        tokenizer: str = "",
        follow: Callable[[], Sequence[str]] | None = None,
    ) -> None:
        """``follow``: the addresses of now, looked up when the known ones give no answer."""
        if not addresses:
            raise UserError("no address of a reward service", where="reward.address")
        self.version = ""
        self._deadline_s = deadline_s
        self._tokenizer = tokenizer
        self._metadata: tuple[tuple[str, str], ...] = ()
        if access.token:
            self._metadata = (("authorization", f"Bearer {access.token}"),)
        self._lock = threading.Lock()
        self._connecting = threading.Lock()
        self._info: ServiceInfo | None = None
        self._turn = 0
        self._closed = False
        self._tls = access.tls
        self._follow = follow
        self._targets = [_Target(address, access.tls) for address in dict.fromkeys(addresses)]
        self._looked_up = time.monotonic()
        self._left: list[_Target] = []  # of addresses that are no longer in use

    def connect(self, timeout_s: float = 10.0) -> ServiceInfo:
        """Reach every address and pin the scorer's version.

        Raises UserError when nobody listens, the token is refused, or replicas differ.
        """
        with self._connecting:
            if self._info is not None:
                return self._info
            self._look_up()
            end = time.monotonic() + timeout_s
            targets, infos = self._reach_all(end, timeout_s)
            for target, info in zip(targets, infos, strict=True):
                if info.scorer_version != infos[0].scorer_version:
                    raise UserError(
                        f"it scores with {info.scorer_version[:12]}, but "
                        f"{targets[0].address} with {infos[0].scorer_version[:12]}: "
                        "replicas must be the same",
                        where=f"reward service {target.address}",
                        fix="start all replicas with the same reward section",
                    )
            self._info = infos[0]
            self.version = infos[0].scorer_version
            return infos[0]

    def _reach_all(self, end: float, timeout_s: float) -> tuple[list[_Target], list[ServiceInfo]]:
        """Those that answer. Where replicas come and go, one that is away is passed over as long as
        another answers; given by the user, all have to be there."""
        reached: list[tuple[_Target, ServiceInfo]] = []
        away: Unreached | None = None
        for target in self._targets:
            try:
                # So that time is left for the next one.
                share = (end - time.monotonic()) / 2 if self._follow is not None else math.inf
                until = min(end, time.monotonic() + max(share, SHORTEST_ATTEMPT_S))
                reached.append((target, self._reach(target, until, timeout_s)))
            except Unreached as problem:
                if self._follow is None:
                    raise
                away = problem
        if not reached:
            assert away is not None
            raise away
        return [target for target, _ in reached], [info for _, info in reached]

    def _reach(self, target: _Target, end: float, timeout_s: float) -> ServiceInfo:
        try:
            reply = target.rewards.GetInfo(
                pb.GetInfoRequest(),
                timeout=max(0.05, end - time.monotonic()),
                metadata=self._metadata,
                wait_for_ready=True,
            )
        except grpc.RpcError as error:
            raise _unreached(target, error, timeout_s, self._metadata) from error
        return wire.decode_info(reply, service=target.address)

    def healthy(self, timeout_s: float = 2.0) -> dict[str, bool]:
        """address -> whether the service there says that it serves."""
        answer = {}
        for target in self._targets:
            try:
                reply = target.health.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
                answer[target.address] = reply.status == health_pb2.HealthCheckResponse.SERVING
            except grpc.RpcError:
                answer[target.address] = False
        return answer

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """One score a rollout, in order. Raises RewardFailure (may work later) or BadReward."""
        return self.score_items(wire.items_of(rollouts, self._tokenizer))

    def score_items(self, items: Sequence[ScoreItem]) -> list[Score]:
        if not items:
            return []
        try:
            info = self.connect()
        except Unreached as problem:
            raise RewardFailure(problem.what) from problem
        size = min(info.max_batch, wire.MAX_ITEMS)
        chunks = wire.split(wire.encode_items(items), size)
        if len(chunks) == 1:
            return self._score_chunk(chunks[0])
        with ThreadPoolExecutor(2 * len(self._targets)) as pool:
            return [score for part in pool.map(self._score_chunk, chunks) for score in part]

    def _score_chunk(self, items: Sequence[pb.Item]) -> list[Score]:
        request = pb.ScoreRequest(request_id=uuid.uuid4().hex, items=items)
        call = _Call(time.monotonic() + self._deadline_s)
        if time.monotonic() - self._looked_up > LOOK_UP_S:
            self._look_up()  # replicas come and go
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(self._again),
            stop=tenacity.stop_before_delay(self._deadline_s),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=2.0),
            reraise=True,
        )
        try:
            target, reply = retrying(self._attempt, request, call)
        except grpc.RpcError as error:
            raise self._failure(error, call) from error
        return wire.decode_reply(
            reply,
            request_id=request.request_id,
            ids=[item.id for item in items],
            version=self.version,
            service=target.address,
        )

    def _attempt(self, request: pb.ScoreRequest, call: _Call) -> tuple[_Target, pb.ScoreResponse]:
        left = max(0.001, call.end - time.monotonic())
        timeout = min(left, max(SHORTEST_ATTEMPT_S, self._deadline_s * ATTEMPT_SHARE))
        if call.failed:
            self._look_up()
        target = self._choose(call.failed)
        try:
            reply = target.rewards.Score(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            call.note(target.address, error)
            raise
        except ValueError as error:  # what grpc raises for a call on a closed channel
            if self._closed:
                raise RewardFailure("the reward client was closed") from error
            raise
        finally:
            with self._lock:
                target.busy -= 1
        return target, reply

    def _choose(self, failed: set[str]) -> _Target:
        """The least busy address, in turn among equals; one that failed this call if all did."""
        with self._lock:
            if self._closed:
                raise RewardFailure("the reward client was closed")
            fresh = [t for t in self._targets if t.address not in failed] or self._targets
            self._turn += 1
            start = self._turn % len(fresh)
            target = min(fresh[start:] + fresh[:start], key=lambda t: t.busy)
            target.busy += 1
            return target

    def _look_up(self) -> None:
        """A service that was started again may listen elsewhere, and there may be more now."""
        self._looked_up = time.monotonic()
        addresses = tuple(dict.fromkeys(self._follow())) if self._follow is not None else ()
        with self._lock:
            known = {target.address: target for target in self._targets}
            if self._closed or not addresses or set(addresses) == known.keys():
                return
            self._targets = [known.get(at) or _Target(at, self._tls) for at in addresses]
            # Their channels stay open: other threads may be waiting on them for a last answer.
            self._left += [target for at, target in known.items() if at not in addresses]

    def _again(self, error: BaseException) -> bool:
        return isinstance(error, grpc.RpcError) and not self._closed and _code(error) in AGAIN

    def _failure(self, error: Any, call: _Call) -> BadReward | RewardFailure:
        service = f"the reward service at {', '.join(sorted(call.failed))}"
        if _code(error) in SCORERS:  # what the scorer says of itself
            here = all(is_loopback(address.rpartition(":")[0]) for address in call.failed)
            kind = SCORERS[_code(error)]
            return kind(error.details() if here else f"{error.details()} ({service})")
        if _code(error) in USERS:
            return BadReward(f"{service} refuses: {error.details()}")
        within = f" within {self._deadline_s:g} s" if _code(error) in AGAIN else ""
        causes = "; ".join(call.causes[:MAX_CAUSES])
        return RewardFailure(f"{service} gave no score{within} ({causes})")

    def close(self) -> None:
        with self._lock:
            self._closed = True
        for target in [*self._targets, *self._left]:
            target.channel.close()

    def __enter__(self) -> RewardClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _code(error: Any) -> Any:
    code: Callable[[], Any] | None = getattr(error, "code", None)
    return code() if code is not None else Code.UNKNOWN


def _last_words(target: _Target, metadata: Any) -> str:
    """Why there is no connection: a call that waits for one is only told that its time is over."""
    try:
        target.rewards.GetInfo(pb.GetInfoRequest(), timeout=LAST_WORDS_S, metadata=metadata)
    except grpc.RpcError as error:
        details: Callable[[], str] = error.details
        return details() or ""
    return ""


class Unreached(UserError):
    """Nobody listens there, now."""


def _unreached(target: _Target, error: Any, timeout_s: float, metadata: Any) -> UserError:
    where = f"reward service {target.address}"
    code = _code(error)
    if code in (Code.DEADLINE_EXCEEDED, Code.UNAVAILABLE):
        if known := why_not_connected(_last_words(target, metadata)):
            return UserError(known[0], where=where, fix=known[1])
        return Unreached(
            f"nobody listens at {target.address} (tried for {timeout_s:g} s)",
            where=where,
            fix="start it with `accord serve-reward`, or correct the address",
        )
    if code is Code.UNAUTHENTICATED:
        return UserError(f"it refuses us: {error.details()}", where=where, fix="give its token")
    return UserError(
        f"what listens there does not speak accord.reward.v1 ({code.name}: {error.details()})",
        where=where,
        fix="give the address of a service started with `accord serve-reward`",
    )
