from __future__ import annotations

import dataclasses
import datetime
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.contracts.errors import BadReward
from cluster.contracts.records import Completion, Prompt, Rollout, Score, VersionSpan
from reward_service import wire
from reward_service.proto import reward_pb2 as pb
from reward_service.source import ScoreItem, ServiceInfo, SourceInfo

ITEM = ScoreItem(
    id="p1#0",
    messages=({"role": "user", "content": "Wie geht's? \u2603"},),
    response="good\n",
    prompt_ids=(1, 2, 300_000),
    response_ids=(4, 0),
    finish_reason="length",
    metadata={"answer": "x", "n": [1, {"deep": None}]},
    tokenizer="abc",
)
SCORES = [
    Score(value=-1.5, parts={"rules": -1.0, "model": 0.25}, scorer_version="v1", vetoes=("r: x",)),
    Score(value=2.0, parts={}, scorer_version="v1"),
]


def decode(reply: pb.ScoreResponse) -> list[Score]:
    return wire.decode_reply(reply, request_id="r", ids=["a", "b"], version="v1", service="host:1")


def reply() -> pb.ScoreResponse:
    return wire.encode_reply("r", "v1", ["a", "b"], SCORES)


def test_request_survives_the_wire() -> None:
    sent = wire.encode_request("r1", [ITEM, dataclasses.replace(ITEM, id="p1#1")])
    received = pb.ScoreRequest.FromString(sent.SerializeToString())
    assert wire.decode_request(received) == [ITEM, dataclasses.replace(ITEM, id="p1#1")]


@settings(max_examples=50, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"])),
    ids=st.lists(st.integers(0, 2**32 - 1)),
    metadata=st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text()),
)
def test_any_item_survives_the_wire(text: str, ids: list[int], metadata: dict[str, Any]) -> None:
    item = dataclasses.replace(ITEM, response=text, response_ids=tuple(ids), metadata=metadata)
    received = pb.ScoreRequest.FromString(wire.encode_request("r", [item]).SerializeToString())
    assert wire.decode_request(received) == [item]


def test_reply_survives_the_wire() -> None:
    assert decode(pb.ScoreResponse.FromString(reply().SerializeToString())) == SCORES


def test_info_survives_the_wire() -> None:
    info = ServiceInfo(
        name="accord",
        scorer_version="v",
        sources=(SourceInfo(name="r", type="rules", weight=0.5, content="c"),),
        max_batch=8,
        tokenizer="t",
    )
    assert wire.decode_info(wire.encode_info(info), service="x") == info


def _count(reply: pb.ScoreResponse) -> None:
    del reply.scores[1]


def _extra(reply: pb.ScoreResponse) -> None:
    reply.scores.add(id="c", value=1.0)


def _swapped(reply: pb.ScoreResponse) -> None:
    reply.scores[0].id, reply.scores[1].id = "b", "a"


def _value(number: float) -> Any:
    def change(reply: pb.ScoreResponse) -> None:
        reply.scores[1].value = number

    return change


def _part(reply: pb.ScoreResponse) -> None:
    reply.scores[0].parts["model"] = math.nan


def _version(reply: pb.ScoreResponse) -> None:
    reply.scorer_version = "v2"


def _request(reply: pb.ScoreResponse) -> None:
    reply.request_id = "other"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_count, "1 scores for 2 items"),
        (_extra, "3 scores for 2 items"),
        (_swapped, "where item 'a' was asked"),
        (_value(math.nan), "'score' = nan for item 'b'"),
        (_value(math.inf), "'score' = inf"),
        (_value(-math.inf), "'score' = -inf"),
        (_value(1e30), "1e\\+30"),
        (_part, "'model' = nan for item 'a'"),
        (_version, "as scorer 'v2', but the run began with 'v1'"),
        (_request, "request 'other'"),
    ],
)
def test_malformed_replies_are_refused_by_name(change: Any, says: str) -> None:
    bad = reply()
    change(bad)
    with pytest.raises(BadReward, match=f"host:1 answered .*{says}"):
        decode(bad)


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.sampled_from(["a", "b", "c", ""]), max_size=3),
    values=st.lists(st.floats(), min_size=3, max_size=3),
    version=st.sampled_from(["v1", "v1", "v2", ""]),
    request=st.sampled_from(["r", "r", "q"]),
)
def test_whatever_is_accepted_is_usable(
    ids: list[str], values: list[float], version: str, request: str
) -> None:
    bad = pb.ScoreResponse(request_id=request, scorer_version=version)
    for name, value in zip(ids, values, strict=False):
        bad.scores.add(id=name, value=value)
    try:
        scores = decode(bad)
    except BadReward:
        return
    assert (ids, version, request) == (["a", "b"], "v1", "r")
    assert all(abs(score.value) <= wire.MAX_ABS_SCORE for score in scores)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("id", "", "id must have"),
        ("id", "x" * (wire.MAX_ID_CHARS + 1), "id must have"),
        ("response", "x" * (wire.MAX_TEXT_CHARS + 1), "a text of 1000001 characters"),
        ("metadata_json", "[1]", "not a JSON object"),
        ("metadata_json", "{", "not JSON"),
        ("metadata_json", "[" * 100_000, "not JSON"),
        ("finish_reason", "abort", "finish_reason 'abort'"),
    ],
)
def test_limits_of_a_request(field: str, value: str, says: str) -> None:
    request = wire.encode_request("r", [ITEM])
    setattr(request.items[0], field, value)
    with pytest.raises(wire.BadRequest, match=says):
        wire.decode_request(request)


def test_requests_without_items_ids_or_with_doubles_are_refused() -> None:
    with pytest.raises(wire.BadRequest, match="1 to 4096 items"):
        wire.decode_request(pb.ScoreRequest(request_id="r"))
    with pytest.raises(wire.BadRequest, match="request_id"):
        wire.decode_request(wire.encode_request("", [ITEM]))
    with pytest.raises(wire.BadRequest, match="occurs twice"):
        wire.decode_request(wire.encode_request("r", [ITEM, ITEM]))
    request = wire.encode_request("r", [ITEM])
    del request.items[0].messages[:]
    with pytest.raises(wire.BadRequest, match="0 messages"):
        wire.decode_request(request)


@pytest.mark.parametrize(
    "change", [{"response": "\ud800"}, {"metadata": {"x": object()}}, {"messages": ()}]
)
def test_what_cannot_travel_names_its_item(change: dict[str, Any]) -> None:
    with pytest.raises(BadReward, match="'p1#0' cannot go"):
        wire.encode_request("r", [dataclasses.replace(ITEM, **change)])


def test_dates_in_metadata_become_text() -> None:
    item = dataclasses.replace(ITEM, metadata={"day": datetime.date(2026, 1, 2)})
    received = wire.decode_request(wire.encode_request("r", [item]))
    assert received[0].metadata == {"day": "2026-01-02"}


def test_items_of_rollouts_have_unique_names() -> None:
    rollout = Rollout(
        prompt=Prompt(id="p", messages=({"role": "user", "content": "q"},), token_ids=(7,)),
        completion=Completion(
            token_ids=(8, 9),
            logprobs=(-1.0, -1.0),
            versions=(VersionSpan(version=0, start=0, end=2),),
            finish_reason="stop",
        ),
        sample_index=3,
        text="a",
    )
    first, second = wire.items_of([rollout, rollout], "fp")
    assert (first.id, second.id) == ("p#3", "p#3@1")
    assert (first.prompt_ids, first.response_ids, first.tokenizer) == ((7,), (8, 9), "fp")
