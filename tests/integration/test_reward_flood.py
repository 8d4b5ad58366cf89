"""`accord serve-reward` under a flood of large messages: bounded memory, and it still serves."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.contracts.records import Completion, Prompt, Rollout, VersionSpan
from reward_service import wire
from reward_service.access import Access
from reward_service.client import RewardClient
from reward_service.proto import reward_pb2 as pb

pytestmark = pytest.mark.slow

MIB = 2**20
GROWTH_MIB = 100
SENDERS = 12
SCORE = "/accord.reward.v1.RewardService/Score"
HEALTH = "/grpc.health.v1.Health/Check"
TOKEN = "a-long-random-word"


@dataclass(frozen=True)
class Service:
    pid: int
    address: str

    def most_mib(self) -> float:
        """Resident memory at its highest since ``forget``."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", text)
        assert found is not None
        return int(found[1]) / 1024

    def forget(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")


@pytest.fixture(scope="module")
def service(command_lines: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    config = folder / "c.toml"
    config.write_text('[[reward.sources]]\ntype = "rules"\nmax_words = 5\n')
    token = folder / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    line = command_lines(folder)
    command = line.start("serve-reward", config, "--token-file", token)
    command.wait_until(lambda: command.stdout.endswith("\n"), 60, "the address")
    running = Service(command.process.pid, command.stdout.strip())
    score(running)  # what it needs once is no growth
    yield running
    line.close()


def score(service: Service) -> None:
    rollout = Rollout(
        prompt=Prompt(id="p", messages=({"role": "user", "content": "q"},), token_ids=(1,)),
        completion=Completion(
            token_ids=(3,),
            logprobs=(-0.5,),
            versions=(VersionSpan(version=0, start=0, end=1),),
            finish_reason="stop",
        ),
        sample_index=0,
        text="one two",
    )
    with RewardClient([service.address], access=Access(token=TOKEN), deadline_s=20) as client:
        assert client.score([rollout])[0].value == 0


def send(address: str, method: str, payloads: list[bytes], token: str | None) -> list[str]:
    """Codes of the answers, from ``SENDERS`` connections at a time."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]

    def one(payload: bytes) -> str:
        with grpc.insecure_channel(address, options) as channel:
            try:
                channel.unary_unary(method)(payload, timeout=20, metadata=metadata)
            except grpc.RpcError as error:
                return str(error.code().name)
            return "OK"

    with ThreadPoolExecutor(SENDERS) as pool:
        return list(pool.map(one, payloads))


@pytest.mark.parametrize("method", [SCORE, HEALTH])
def test_large_messages_without_a_token_are_not_even_read(service: Service, method: str) -> None:
    before = start(service)
    codes = send(service.address, method, [bytes(60 * MIB)] * 24, None)
    assert set(codes) <= {"UNAUTHENTICATED", "OK", "UNAVAILABLE"}
    assert service.most_mib() - before < GROWTH_MIB
    score(service)


def test_large_messages_with_a_token_wait_for_room_or_are_refused(service: Service) -> None:
    before = start(service)
    valid = [
        request(number, kind) for number, kind in enumerate(("text", "tokens", "metadata") * 6)
    ]
    codes = send(service.address, SCORE, [*valid, *[bytes(60 * MIB)] * 8], TOKEN)
    assert set(codes[: len(valid)]) <= {"OK", "RESOURCE_EXHAUSTED"}
    assert codes.count("OK") > len(valid) // 2
    assert "OK" not in codes[len(valid) :]
    assert service.most_mib() - before < GROWTH_MIB
    score(service)


def start(service: Service) -> float:
    time.sleep(0.2)
    service.forget()
    return service.most_mib()


def request(number: int, kind: str) -> bytes:
    """As large as the protocol allows, in the field that grows most when it is read."""
    item = pb.Item(id="i", response="x", finish_reason="stop", metadata_json="{}")
    item.messages.add(role="user", content="q")
    if kind == "text":
        del item.messages[:]
        for _ in range(3):
            item.messages.add(role="user", content="x" * wire.MAX_TEXT_CHARS)
    elif kind == "tokens":
        item.response_ids.extend(range(1000, 1000 + wire.MAX_TOKENS))
    else:
        item.metadata_json = '{"a":[' + "[],{}," * 160_000 + "0]}"
    return pb.ScoreRequest(request_id=f"r{number}", items=[item]).SerializeToString()
