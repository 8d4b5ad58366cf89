"""Records <-> protobuf. The only file that knows both; limits and reply checks live here too."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from cluster.contracts.errors import BadReward
from cluster.contracts.records import Rollout, Score
from reward_service.proto import reward_pb2 as pb
from reward_service.source import ScoreItem, ServiceInfo, SourceInfo

MAX_ITEMS = 4096
MAX_ID_CHARS = 512
MAX_MESSAGES = 1024
MAX_TEXT_CHARS = 1_000_000
MAX_TOKENS = 1_048_576  # of a request
MAX_METADATA_CHARS = 1_000_000
MAX_REQUEST_METADATA_CHARS = 2_000_000
MAX_MESSAGE_BYTES = 4 * 1024 * 1024  # what gRPC receives by default, so other servers take it, too
FULL_BYTES = 1024 * 1024  # a client begins another request then
# What a request becomes in memory: Python's integers, the lists and dicts of JSON at their worst,
# and a few copies of the message.
TOKEN_BYTES = 36
METADATA_FACTOR = 24
COPIES = 4
# No reward of a sane scale comes near; a larger one is a scorer gone wrong (1e30 is finite, too).
MAX_ABS_SCORE = 1e6

FINISH_REASONS = ("stop", "length")


class BadRequest(Exception):
    """A request that breaks the protocol or a limit; the text says where."""


def items_of(rollouts: Sequence[Rollout], tokenizer: str = "") -> list[ScoreItem]:
    """Items named ``prompt id#sample``; a repeated one gets ``@position``: ids are unique."""
    items, seen = [], set()
    for position, rollout in enumerate(rollouts):
        name = f"{rollout.prompt.id}#{rollout.sample_index}"
        if name in seen:
            name = f"{name}@{position}"
        seen.add(name)
        items.append(
            ScoreItem(
                id=name,
                messages=rollout.prompt.messages,
                response=rollout.text,
                prompt_ids=rollout.prompt.token_ids,
                response_ids=tuple(rollout.completion.token_ids),
                finish_reason=rollout.completion.finish_reason,
                metadata=rollout.prompt.metadata,
                tokenizer=tokenizer,
                where=_place(rollout),
            )
        )
    return items


def _place(rollout: Rollout) -> str:
    where = rollout.prompt.where
    return f"{where}, completion {rollout.sample_index + 1}" if where else ""


def encode_request(request_id: str, items: Sequence[ScoreItem]) -> pb.ScoreRequest:
    """Raises BadReward for an item that cannot travel (not text, not JSON, over a limit)."""
    return pb.ScoreRequest(request_id=request_id, items=encode_items(items))


def encode_items(items: Sequence[ScoreItem]) -> list[pb.Item]:
    """Raises BadReward as ``encode_request``."""
    found = []
    written: dict[int, str] = {}  # the samples of a prompt share its metadata: written out once
    for item in items:
        try:
            if (text := written.get(id(item.metadata))) is None:
                text = json.dumps(dict(item.metadata), default=_plain)
                written[id(item.metadata)] = text
            encoded = _encode_item(item, text)
            _check_item(encoded)
        except (BadRequest, TypeError, ValueError) as error:  # ValueError: a lone surrogate
            raise BadReward(f"{item.label} cannot go to the reward service: {error}") from error
        found.append(encoded)
    return found


def split(items: Sequence[pb.Item], most: int) -> list[list[pb.Item]]:
    """In order, into requests of at most ``most`` items; one that is full by its bytes takes no
    further item."""
    parts: list[list[pb.Item]] = []
    room = 0
    for item in items:
        size = item.ByteSize()
        if not parts or len(parts[-1]) >= most or size > room:
            parts.append([])
            room = FULL_BYTES
        parts[-1].append(item)
        room -= size
    return parts


def memory_of(request: pb.ScoreRequest, size: int) -> int:
    """Bytes that a request of ``size`` bytes may take when it is decoded, at most."""
    tokens = sum(len(item.prompt_ids) + len(item.response_ids) for item in request.items)
    metadata = sum(len(item.metadata_json) for item in request.items)
    return COPIES * size + TOKEN_BYTES * tokens + METADATA_FACTOR * metadata


def _encode_item(item: ScoreItem, metadata_json: str) -> pb.Item:
    return pb.Item(
        id=item.id,
        messages=[pb.Message(role=m["role"], content=m["content"]) for m in item.messages],
        response=item.response,
        prompt_ids=item.prompt_ids,
        response_ids=item.response_ids,
        finish_reason=item.finish_reason,
        metadata_json=metadata_json,
        tokenizer=item.tokenizer,
        where=item.where,
    )


def _plain(value: Any) -> str:
    if hasattr(value, "isoformat"):  # dates and times of Parquet columns
        return str(value.isoformat())
    raise TypeError(f"metadata holds a {type(value).__name__}, which JSON cannot")


def check_request(request: pb.ScoreRequest) -> None:
    """Raises BadRequest when a field is missing or over its limit. Decodes nothing."""
    if not 0 < len(request.request_id) <= MAX_ID_CHARS:
        raise BadRequest(f"request_id must have 1 to {MAX_ID_CHARS} characters")
    if not 0 < len(request.items) <= MAX_ITEMS:
        raise BadRequest(f"a request has 1 to {MAX_ITEMS} items, this one {len(request.items)}")
    seen: set[str] = set()
    for item in request.items:
        _check_item(item)
        if item.id in seen:
            raise BadRequest(f"item id {item.id!r} occurs twice")
        seen.add(item.id)
    tokens = sum(len(item.prompt_ids) + len(item.response_ids) for item in request.items)
    if tokens > MAX_TOKENS:
        raise BadRequest(f"a request of {tokens} tokens, the limit is {MAX_TOKENS}")
    metadata = sum(len(item.metadata_json) for item in request.items)
    if metadata > MAX_REQUEST_METADATA_CHARS:
        raise BadRequest(
            f"a request with {metadata} characters of metadata, "
            f"the limit is {MAX_REQUEST_METADATA_CHARS}"
        )


def decode_request(request: pb.ScoreRequest) -> list[ScoreItem]:
    """Raises BadRequest when a field is missing, malformed or over its limit."""
    check_request(request)
    return [_decode_item(item) for item in request.items]


def _check_item(item: pb.Item) -> None:
    where = f"item {item.id[:80]!r}"
    if not 0 < len(item.id) <= MAX_ID_CHARS:
        raise BadRequest(f"{where}: id must have 1 to {MAX_ID_CHARS} characters")
    if not 0 < len(item.messages) <= MAX_MESSAGES:
        raise BadRequest(f"{where}: {len(item.messages)} messages, allowed are 1 to {MAX_MESSAGES}")
    texts = [item.response, item.tokenizer, item.where, *(m.role for m in item.messages)]
    texts += [m.content for m in item.messages]
    if (longest := max(map(len, texts))) > MAX_TEXT_CHARS:
        raise BadRequest(f"{where}: a text of {longest} characters, the limit is {MAX_TEXT_CHARS}")
    if (tokens := len(item.prompt_ids) + len(item.response_ids)) > MAX_TOKENS:
        raise BadRequest(f"{where}: {tokens} tokens, the limit is {MAX_TOKENS}")
    if len(item.metadata_json) > MAX_METADATA_CHARS:
        raise BadRequest(f"{where}: metadata over {MAX_METADATA_CHARS} characters")
    if (size := item.ByteSize()) > MAX_MESSAGE_BYTES - 2 * MAX_ID_CHARS:
        raise BadRequest(f"{where}: {size} bytes, the limit is {MAX_MESSAGE_BYTES}")
    if item.finish_reason not in FINISH_REASONS:
        reason = item.finish_reason[:20]
        raise BadRequest(f"{where}: finish_reason {reason!r} is not one of {FINISH_REASONS}")


def _decode_item(item: pb.Item) -> ScoreItem:
    try:
        metadata = json.loads(item.metadata_json or "{}")
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"item {item.id!r}: metadata_json is not JSON ({error})") from error
    if not isinstance(metadata, dict):
        raise BadRequest(f"item {item.id!r}: metadata_json is not a JSON object")
    return ScoreItem(
        id=item.id,
        messages=tuple({"role": m.role, "content": m.content} for m in item.messages),
        response=item.response,
        prompt_ids=tuple(item.prompt_ids),
        response_ids=tuple(item.response_ids),
        finish_reason=item.finish_reason,
        metadata=metadata,
        tokenizer=item.tokenizer,
        where=item.where,
    )


def encode_reply(
    request_id: str, version: str, ids: Sequence[str], scores: Sequence[Score]
) -> pb.ScoreResponse:
    return pb.ScoreResponse(
        request_id=request_id,
        scorer_version=version,
        scores=[
            pb.ItemScore(id=name, value=score.value, parts=dict(score.parts), vetoes=score.vetoes)
            for name, score in zip(ids, scores, strict=True)
        ],
    )


def decode_reply(
    reply: pb.ScoreResponse, *, request_id: str, ids: Sequence[str], version: str, service: str
) -> list[Score]:
    """Scores in the order of ``ids``; raises BadReward, naming the service, for any other reply.

    Refused: another request id or scorer version, a wrong number of scores, other ids or another
    order, a value or part that is not finite or beyond ±MAX_ABS_SCORE.
    """

    def refuse(what: str) -> BadReward:
        return BadReward(f"the reward service at {service} answered {what}")

    if reply.request_id != request_id:
        raise refuse(f"request {reply.request_id[:80]!r}, asked was {request_id!r}")
    if reply.scorer_version != version:
        raise refuse(
            f"as scorer {reply.scorer_version[:80]!r}, but the run began with {version!r}; "
            "the scorer must not change during a run"
        )
    if len(reply.scores) != len(ids):
        raise refuse(f"{len(reply.scores)} scores for {len(ids)} items")
    for score, asked in zip(reply.scores, ids, strict=True):
        if score.id != asked:
            raise refuse(f"a score for item {score.id[:80]!r} where item {asked!r} was asked")
        for name, number in (("score", score.value), *score.parts.items()):
            if not math.isfinite(number) or abs(number) > MAX_ABS_SCORE:
                limit = f"allowed is ±{MAX_ABS_SCORE:g}"
                raise refuse(f"{name!r} = {number} for item {asked!r}; {limit}")
    return [
        Score(
            value=score.value,
            parts=dict(score.parts),
            scorer_version=reply.scorer_version,
            vetoes=tuple(score.vetoes),
        )
        for score in reply.scores
    ]


def encode_info(info: ServiceInfo) -> pb.GetInfoResponse:
    return pb.GetInfoResponse(
        name=info.name,
        scorer_version=info.scorer_version,
        sources=[
            pb.Source(name=s.name, type=s.type, weight=s.weight, content=s.content)
            for s in info.sources
        ],
        max_batch=info.max_batch,
        tokenizer=info.tokenizer,
    )


def decode_info(reply: pb.GetInfoResponse, *, service: str) -> ServiceInfo:
    if not reply.scorer_version or not 0 < reply.max_batch <= MAX_ITEMS:
        raise BadReward(
            f"the reward service at {service} does not say its scorer_version, or a max_batch "
            f"of 1 to {MAX_ITEMS}"
        )
    return ServiceInfo(
        name=reply.name,
        scorer_version=reply.scorer_version,
        sources=tuple(
            SourceInfo(name=s.name, type=s.type, weight=s.weight, content=s.content)
            for s in reply.sources
        ),
        max_batch=reply.max_batch,
        tokenizer=reply.tokenizer,
    )
