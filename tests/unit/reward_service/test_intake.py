"""What a request may take in memory, and how a long one is split before it is sent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from reward_service import wire
from reward_service.batching import Overloaded
from reward_service.intake import Intake, Room
from reward_service.proto import reward_pb2 as pb

CONTEXT = SimpleNamespace(cancel=lambda: None)


def item(name: str, response: str = "x", metadata: str = "{}", tokens: int = 0) -> pb.Item:
    made = pb.Item(
        id=name,
        response=response,
        finish_reason="stop",
        metadata_json=metadata,
        response_ids=[5] * tokens,
    )
    made.messages.add(role="user", content="q")
    return made


def sent(*items: pb.Item) -> Iterator[bytes]:
    return iter([pb.ScoreRequest(request_id="r", items=items).SerializeToString()])


def test_room_is_lent_up_to_its_size_and_one_request_alone_may_exceed_it() -> None:
    room = Room(100)
    first = room.take(60, 0)
    room.take(40, 0).end()
    with pytest.raises(Overloaded):
        room.take(41, 0.01)
    threading.Timer(0.05, first.end).start()
    large = room.take(500, 10)  # waits for the first
    with pytest.raises(Overloaded):
        room.take(1, 0.01)
    large.end()
    large.end()
    assert room.take(100, 0).amount == 100


def test_a_request_keeps_its_room_until_its_loan_ends() -> None:
    intake = Intake(room=100_000)
    read = intake.read(sent(item("a", "x" * 20_000)), CONTEXT, 1)
    assert [one.id for one in read.items] == ["a"]
    with pytest.raises(Overloaded, match="are waiting"):
        intake.read(sent(item("b", "x" * 20_000)), CONTEXT, 0.01)
    read.loan.end()
    intake.read(sent(item("b", "x" * 20_000)), CONTEXT, 0.01).loan.end()


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (iter([]), "carries no message"),
        (iter([b"\xff\xff\xff"]), "not a ScoreRequest"),
        (sent(item("a", metadata="{")), "not JSON"),
        (sent(*(item(f"{n}", tokens=600_000) for n in range(2))), "1200000 tokens"),
        (sent(*(item(f"{n}", metadata='"' + "x" * 900_000) for n in range(3))), "of metadata"),
    ],
)
def test_a_request_that_is_refused_keeps_no_room(messages: Iterator[bytes], says: str) -> None:
    intake = Intake(room=100)
    with pytest.raises(wire.BadRequest, match=says):
        intake.read(messages, CONTEXT, 1)
    intake.read(sent(item("a", "x" * 20_000)), CONTEXT, 0.01)  # more than the room: it is alone


def test_long_requests_are_split_by_their_bytes_and_all_by_their_number() -> None:
    long = [item(f"{n}", "x" * 400_000) for n in range(5)]
    assert [len(part) for part in wire.split(long, 64)] == [2, 2, 1]
    assert [len(part) for part in wire.split([item(f"{n}") for n in range(5)], 2)] == [2, 2, 1]
    huge = [item("a"), item("b", "x" * 2_000_000), item("c")]
    assert [[one.id for one in part] for part in wire.split(huge, 64)] == [["a"], ["b"], ["c"]]
    assert wire.split([], 64) == []
