"""Real gRPC on loopback: server, client, faults between them. No Ray, no torch."""

from __future__ import annotations

import contextlib
import math
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.contracts.config.reward import (
    FunctionSource,
    GrpcSource,
    RewardConfig,
    RulesSource,
    TlsSection,
)
from cluster.contracts.errors import BadReward, RewardFailure, Unrated, UserError
from cluster.contracts.records import Completion, Prompt, Rollout, Score, VersionSpan
from reward_service import server as server_module
from reward_service import wire
from reward_service.access import Access, Tls, read_tls
from reward_service.certificate import run_access
from reward_service.client import RewardClient
from reward_service.composition import Composition, check_source
from reward_service.proto import reward_pb2 as pb
from reward_service.proto import reward_pb2_grpc
from reward_service.server import RunningServer, serve, serve_composition
from reward_service.source import Part, ScoreItem


def rollout(text: str, name: str = "p", **metadata: Any) -> Rollout:
    return Rollout(
        prompt=Prompt(
            id=name,
            messages=({"role": "user", "content": "q"},),
            token_ids=(1, 2),
            metadata=metadata,
        ),
        completion=Completion(
            token_ids=(3,),
            logprobs=(-0.5,),
            versions=(VersionSpan(version=0, start=0, end=1),),
            finish_reason="stop",
        ),
        sample_index=0,
        text=text,
    )


class Words:
    """One point a word; counts what it scored, and can be made to wait or fail."""

    name = "words"
    type = "test"
    tokenizer = ""

    def __init__(self, content: str = "words/1") -> None:
        self.content = content
        self.scored: list[str] = []
        self.calls = 0
        self.closed = False
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.error: Exception | None = None

    def score(self, items: Sequence[ScoreItem]) -> list[Part]:
        self.entered.set()
        assert self.gate.wait(10)
        self.calls += 1
        if self.error is not None:
            raise self.error
        self.scored += [item.response for item in items]
        return [Part(float(len(item.response.split()))) for item in items]

    def close(self) -> None:
        self.closed = True


def config(**keys: Any) -> RewardConfig:
    return RewardConfig(sources=[RulesSource()], **keys)


def start(words: Words, port: int = 0, **keys: Any) -> RunningServer:
    composition = Composition([words], [1.0])
    return serve_composition(composition, config(**keys), port=port)


@pytest.fixture
def words() -> Words:
    return Words()


@pytest.fixture
def server(words: Words) -> Iterator[RunningServer]:
    with start(words) as running:
        yield running


def port_of(server: RunningServer) -> int:
    return int(server.address.rpartition(":")[2])


def values(scores: Sequence[Score]) -> list[float]:
    return [score.value for score in scores]


def test_scores_come_back_in_order_with_who_computed_them(server: RunningServer) -> None:
    with RewardClient([server.address]) as client:
        info = client.connect()
        scores = client.score([rollout("a b c"), rollout("a"), rollout("")])
        assert values(scores) == [3, 1, 0]
        assert scores[0].parts == {"words": 3.0}
        assert scores[0].scorer_version == info.scorer_version == client.version != ""
        assert (info.sources[0].name, info.max_batch) == ("words", 64)
        assert client.score([]) == []


def test_more_rollouts_than_a_batch_are_split(words: Words) -> None:
    with start(words, max_batch=4) as running, RewardClient([running.address]) as client:
        texts = ["x " * n for n in range(30)]
        assert values(client.score([rollout(t) for t in texts])) == [float(n) for n in range(30)]
        assert words.calls >= 8


def test_64_concurrent_requests_share_batches(words: Words) -> None:
    with start(words, max_batch=64, max_wait_ms=200) as running:
        with RewardClient([running.address]) as client, ThreadPoolExecutor(64) as pool:
            client.connect()
            scores = pool.map(lambda n: client.score([rollout("x " * n)])[0].value, range(64))
            assert list(scores) == [float(n) for n in range(64)]
        assert running.coalescer.items == 64
        assert running.coalescer.batches <= 4


def test_retries_outlive_a_restart_of_the_server(words: Words) -> None:
    first = start(words)
    address, port = first.address, port_of(first)
    with RewardClient([address], deadline_s=15) as client:
        client.connect()
        first.stop(0)
        assert words.closed
        with ThreadPoolExecutor(1) as pool:
            scores = pool.submit(client.score, [rollout("a b")])
            time.sleep(0.6)
            assert not scores.done()
            with start(Words(), port=port):
                assert values(scores.result(10)) == [2]


def test_replicas_come_and_go_and_no_call_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("reward_service.client.LOOK_UP_S", 0.0)
    scored = [Words(), Words()]
    with start(scored[0]) as first, start(scored[1]) as second:
        places = [first.address]
        with RewardClient(places, deadline_s=15, follow=lambda: list(places)) as client:
            assert values(client.score([rollout("a")])) == [1]
            places.append(second.address)
            with ThreadPoolExecutor(8) as pool:
                asked = [pool.submit(client.score, [rollout("x " * n)]) for n in range(40)]
                assert [values(call.result(20)) for call in asked] == [
                    [float(n)] for n in range(40)
                ]
            assert scored[0].calls > 1
            assert scored[1].calls > 1
            places.remove(first.address)
            assert values(client.score([rollout("a b")])) == [2]
            before = scored[0].calls
            first.stop(0)
            for n in range(10):
                assert values(client.score([rollout("x " * n)])) == [n]
            assert scored[0].calls == before


def test_a_worker_that_joins_while_a_replica_is_away_asks_the_others(words: Words) -> None:
    with start(words) as there:
        gone = start(Words())
        places = [gone.address, there.address]
        gone.stop(0)
        with RewardClient(places, deadline_s=15, follow=lambda: places) as client:
            client.connect(timeout_s=4.0)
            assert values(client.score([rollout("a b")])) == [2]
        with RewardClient(places, deadline_s=15) as named, pytest.raises(UserError):
            named.connect(timeout_s=2.0)


def test_another_scorer_after_a_restart_is_refused(words: Words) -> None:
    first = start(words)
    with RewardClient([first.address], deadline_s=15) as client:
        client.connect()
        first.stop(0)
        with (
            start(Words("words/2"), port=port_of(first)),
            pytest.raises(BadReward, match="must not change during a run"),
        ):
            client.score([rollout("a")])


def test_a_service_that_is_gone_is_a_failure_within_the_deadline(words: Words) -> None:
    running = start(words)
    with RewardClient([running.address], deadline_s=1.5) as client:
        client.connect()
        running.stop(0)
        begun = time.monotonic()
        with pytest.raises(RewardFailure, match=f"{running.address} gave no score within 1.5 s"):
            client.score([rollout("a")])
        assert time.monotonic() - begun < 3


def test_a_slow_service_is_a_failure_and_its_late_work_is_dropped(words: Words) -> None:
    with start(words) as running, RewardClient([running.address], deadline_s=1.0) as client:
        client.connect()
        words.gate.clear()
        with ThreadPoolExecutor(1) as pool:
            stuck = pool.submit(client.score, [rollout("first")])
            assert words.entered.wait(5)
            with pytest.raises(RewardFailure, match="DEADLINE"):
                client.score([rollout("late")])
            with pytest.raises(RewardFailure):
                stuck.result(5)
        time.sleep(0.2)  # the server rounds deadlines up a little
        words.gate.set()
        time.sleep(0.2)
        assert words.scored == ["first"]


def test_a_replica_that_fails_is_left_out_of_the_next_try(
    words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Words()
    tried: list[str] = []
    choose = RewardClient._choose

    def noted(client: RewardClient, failed: set[str]) -> Any:
        target = choose(client, failed)
        tried.append(target.address)
        return target

    monkeypatch.setattr(RewardClient, "_choose", noted)
    with (
        start(words) as one,
        start(other) as two,
        RewardClient([one.address, two.address], deadline_s=10) as client,
    ):
        client.connect()
        one.stop(0)
        client._targets[1].busy = 5  # so that the dead one always looks like the better choice
        for _ in range(6):
            tried.clear()
            assert values(client.score([rollout("a b")])) == [2]
            assert tried == [one.address, two.address]
        assert client.healthy() == {one.address: False, two.address: True}
    assert len(other.scored) == 6


def test_replicas_share_the_work(words: Words) -> None:
    other = Words()
    with (
        start(words) as one,
        start(other) as two,
        RewardClient([one.address, two.address]) as client,
    ):
        for _ in range(10):
            client.score([rollout("a")])
    assert (len(words.scored), len(other.scored)) == (5, 5)


def test_replicas_with_different_scorers_are_refused(words: Words) -> None:
    with (
        start(words) as one,
        start(Words("words/2")) as two,
        RewardClient([one.address, two.address]) as client,
        pytest.raises(UserError, match="replicas must be the same"),
    ):
        client.connect()


def test_nobody_listens() -> None:
    with start(Words()) as running:
        address = running.address
    with (
        RewardClient([address]) as client,
        pytest.raises(UserError, match=f"nobody listens at {address}"),
    ):
        client.connect(timeout_s=0.5)


def test_a_port_in_use_is_the_users_error(server: RunningServer) -> None:
    with pytest.raises(UserError, match=f"{server.address}: .*port is in use"):
        serve(config(), port=port_of(server))


def stub(address: str) -> tuple[grpc.Channel, reward_pb2_grpc.RewardServiceStub]:
    channel = grpc.insecure_channel(address)
    return channel, reward_pb2_grpc.RewardServiceStub(channel)


def test_the_same_request_id_is_scored_once(server: RunningServer, words: Words) -> None:
    request = wire.encode_request("once", wire.items_of([rollout("a b")]))
    channel, service = stub(server.address)
    with channel:
        replies = [service.Score(request, timeout=5) for _ in range(3)]
        other = wire.encode_request("once", wire.items_of([rollout("a b c")]))
        with pytest.raises(grpc.RpcError) as caught:
            service.Score(other, timeout=5)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert replies[0] == replies[1] == replies[2]
    assert words.scored == ["a b"]


def test_a_retry_during_scoring_joins_it(server: RunningServer, words: Words) -> None:
    request = wire.encode_request("joined", wire.items_of([rollout("a b")]))
    channel, service = stub(server.address)
    words.gate.clear()
    with channel:
        first = service.Score.future(request, timeout=0.3)
        assert first.exception().code() is grpc.StatusCode.DEADLINE_EXCEEDED
        second = service.Score.future(request, timeout=10)
        time.sleep(0.1)
        words.gate.set()
        assert second.result().scores[0].value == 2
    assert words.scored == ["a b"]


def test_a_scorers_error_reaches_the_run_with_its_text(server: RunningServer, words: Words) -> None:
    words.error = BadReward("rewards.py:f returned nan for 'p7#0' \u2603")
    with (
        RewardClient([server.address]) as client,
        pytest.raises(BadReward, match="returned nan for 'p7#0' \u2603"),
    ):
        client.score([rollout("a")])
    assert words.calls == 1  # never tried again


def test_a_completion_without_a_score_reaches_the_run_as_that(
    server: RunningServer, words: Words
) -> None:
    words.error = Unrated("the judge gave no usable answer about 'p7#0'")
    with (
        RewardClient([server.address]) as client,
        pytest.raises(Unrated, match="no usable answer about 'p7#0'"),
    ):
        client.score([rollout("a")])
    assert words.calls == 1  # never tried again


@pytest.mark.parametrize("filling", ["x", "%", "\n", "\u00e9", "\u2603", "\U0001f600"])
def test_a_very_long_error_still_arrives(server: RunningServer, words: Words, filling: str) -> None:
    """gRPC refuses trailers over 8 KiB at random: one call may pass where the next fails."""
    words.error = BadReward("cause " + filling * 100_000)
    with RewardClient([server.address], deadline_s=5) as client:
        for _ in range(8):
            with pytest.raises(BadReward, match="cause"):
                client.score([rollout("a")])


def test_a_users_function_over_the_wire(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(
        "def right(completions, answer, **rest):\n"
        "    return [float(c[0]['content'] == a) for c, a in zip(completions, answer)]\n"
    )
    source = FunctionSource(path=f"{tmp_path}/rewards.py:right")
    with (
        serve(RewardConfig(sources=[source])) as running,
        RewardClient([running.address]) as client,
    ):
        assert values(client.score([rollout("4", answer="4"), rollout("5", answer="4")])) == [
            1,
            0,
        ]
        with pytest.raises(
            BadReward, match=r"takes 'answer', but the row of item 'lone#0' .*prompt$"
        ):
            client.score([rollout("4", "lone")])


def test_a_service_can_be_a_source_of_another(server: RunningServer, words: Words) -> None:
    cfg = RewardConfig(
        sources=[RulesSource(min_words=2), GrpcSource(address=server.address, weight=0.5)],
        deadline_s=1,
    )
    with serve(cfg) as outer, RewardClient([outer.address], deadline_s=3) as client:
        score = client.score([rollout("one")])[0]
        assert (score.value, score.parts) == (-0.5, {"rules": -1.0, "grpc": 1.0})
        words.error = BadReward("deep cause")
        with pytest.raises(BadReward, match="deep cause"):
            client.score([rollout("one")])
        server.stop(0)
        with pytest.raises(RewardFailure, match=server.address):
            client.score([rollout("one")])
    with pytest.raises(UserError, match=f"nobody listens at {server.address}"):
        serve_quickly(cfg)


def serve_quickly(cfg: RewardConfig) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RewardClient.connect, "__defaults__", (0.3,))
        serve(cfg).stop()


def test_a_token_is_asked_for_everything_but_health(words: Words) -> None:
    cfg = config()
    with serve(cfg, access=Access(token="s3cret")) as running:
        with RewardClient([running.address], access=Access(token="s3cret")) as client:
            assert values(client.score([rollout("a")])) == [0]
        for wrong in (None, "s3cre", "s3cret2"):
            with (
                RewardClient([running.address], access=Access(token=wrong)) as client,
                pytest.raises(UserError, match="token is missing or wrong"),
            ):
                client.connect()
        channel, service = stub(running.address)
        with channel:
            request = wire.encode_request("r", wire.items_of([rollout("a")]))
            with pytest.raises(grpc.RpcError) as caught:
                service.Score(request, timeout=5)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            health = health_pb2_grpc.HealthStub(channel)
            name = "accord.reward.v1.RewardService"
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_network_address_needs_a_token() -> None:
    with pytest.raises(UserError, match="other machines can reach"):
        serve(config(), host="0.0.0.0")
    with serve(config(), host="0.0.0.0", access=Access(token="t")) as running:
        assert running.address.startswith("0.0.0.0:")


def _certificate(folder: Path) -> tuple[Path, Path]:
    key, certificate = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    return certificate, key


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_mutual_tls_and_a_token_between_services(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source of type grpc reaches a service that asks for a certificate and a token; who lacks
    one of them gets no score and a message that says which."""
    certificate, key = map(str, _certificate(tmp_path))
    files = read_tls(certificate, certificate, key)
    assert files is not None
    monkeypatch.setenv("INNER_TOKEN", "s3cret")
    with serve(config(), access=Access(token="s3cret", tls=files)) as inner:
        source = GrpcSource(
            address=inner.address,
            token_env="INNER_TOKEN",
            tls=TlsSection(ca=certificate, cert=certificate, key=key),
        )
        check_source(source, [])
        with (
            serve(RewardConfig(sources=[source])) as outer,
            RewardClient([outer.address]) as client,
        ):
            assert values(client.score([rollout("a")])) == [0]
        for stranger, why in (
            (Access(token="s3cret", tls=Tls(ca=files.ca)), "wants a client certificate"),
            (Access(token="s3cret", tls=run_access(encrypted=True)[1].tls), "not signed by"),
            (Access(token="s3cret"), "it encrypts"),
            (Access(tls=files), "token is missing or wrong"),
        ):
            with (
                RewardClient([inner.address], access=stranger) as client,
                pytest.raises(UserError, match=why),
            ):
                client.connect(timeout_s=0.5)
    monkeypatch.delenv("INNER_TOKEN")
    with pytest.raises(UserError, match="INNER_TOKEN is not set"):
        check_source(source, [])


def test_what_a_run_scores_does_not_travel_in_clear(words: Words) -> None:
    """With the certificate made for a run; without one, the relay between them reads it all."""
    composition = Composition([words], [1.0])
    secret = "a-completion-nobody-else-reads"
    for encrypted in (True, False):
        own, theirs = run_access(encrypted=encrypted)
        with (
            serve_composition(composition, config(), access=own) as running,
            Relay(running.address) as relay,
            RewardClient([relay.address], access=theirs) as client,
        ):
            assert values(client.score([rollout(secret)])) == [1]
            with (
                RewardClient([relay.address], access=run_access(encrypted=encrypted)[1]) as other,
                pytest.raises(UserError, match=r"not signed by|token is"),
            ):
                other.connect(timeout_s=1)
        assert theirs.token is not None
        for word in (secret, theirs.token):
            assert (word.encode() in relay.heard) != encrypted
        assert theirs.token not in repr((own, theirs))


class Relay:
    """Hands bytes on between a client and the address, and keeps them."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._target = (host, int(port))
        self._server = socket.create_server(("127.0.0.1", 0))
        self._open = [self._server]
        self.heard = b""
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near = self._server.accept()[0]
                far = socket.create_connection(self._target)
                self._open += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.heard += data
                sink.sendall(data)

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *exc: object) -> None:
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def test_malformed_requests_are_refused(server: RunningServer, words: Words) -> None:
    channel, service = stub(server.address)
    with channel:
        for request in (pb.ScoreRequest(), pb.ScoreRequest(request_id="r", items=[pb.Item()])):
            with pytest.raises(grpc.RpcError) as caught:
                service.Score(request, timeout=5)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words.scored == []


def test_an_overloaded_service_is_asked_again(
    server: RunningServer, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, refused = server.coalescer.submit, []

    def sometimes(items: Any, deadline: float) -> Any:
        if len(refused) < 3:
            refused.append(1)
            raise server_module.Overloaded("full")
        return submit(items, deadline)

    monkeypatch.setattr(server.coalescer, "submit", sometimes)
    with RewardClient([server.address], deadline_s=10) as client:
        assert values(client.score([rollout("a b")])) == [2]
    assert (len(refused), words.scored) == (3, ["a b"])


class Liar(reward_pb2_grpc.RewardServiceServicer):
    """A foreign service that answers whatever it is told to."""

    def __init__(self) -> None:
        self.change: Any = None

    def GetInfo(self, request: Any, context: Any) -> pb.GetInfoResponse:
        return pb.GetInfoResponse(name="liar", scorer_version="v1", max_batch=8)

    def Score(self, request: Any, context: Any) -> pb.ScoreResponse:
        scores = [pb.ItemScore(id=item.id, value=1.0) for item in request.items]
        reply = pb.ScoreResponse(request_id=request.request_id, scorer_version="v1", scores=scores)
        self.change(reply)
        return reply


@pytest.mark.parametrize(
    "change",
    [
        lambda reply: setattr(reply.scores[0], "value", math.nan),
        lambda reply: setattr(reply.scores[0], "value", -math.inf),
        lambda reply: setattr(reply.scores[0], "id", "other"),
        lambda reply: reply.scores.add(id="extra"),
        lambda reply: reply.ClearField("scores"),
        lambda reply: setattr(reply, "scorer_version", "v2"),
        lambda reply: setattr(reply, "request_id", "r0"),
    ],
)
def test_a_service_that_answers_nonsense_is_refused_by_name(change: Any) -> None:
    liar = Liar()
    liar.change = change
    foreign = grpc.server(ThreadPoolExecutor(2))
    reward_pb2_grpc.add_RewardServiceServicer_to_server(liar, foreign)
    address = f"127.0.0.1:{foreign.add_insecure_port('127.0.0.1:0')}"
    foreign.start()
    try:
        with (
            RewardClient([address], deadline_s=5) as client,
            pytest.raises(BadReward, match=f"{address} answered"),
        ):
            client.score([rollout("a")])
    finally:
        foreign.stop(0).wait(5)


def test_stopping_twice_leaves_no_thread_and_frees_the_port(words: Words) -> None:
    running = start(words)
    port = port_of(running)
    running.stop()
    running.stop()
    assert words.closed
    assert not [t for t in threading.enumerate() if t.name == "accord-scoring"]
    start(words, port=port).stop()
