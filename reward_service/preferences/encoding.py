"""Records <-> rows of the store's tables. What has no fixed columns is JSON text."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from reward_service.preferences.records import (
    Candidate,
    ChosenBy,
    Gold,
    Item,
    Judgement,
    prompt_hash,
)

ITEM_COLUMNS = (
    "id", "prompt_hash", "messages", "completions", "topic", "gold", "source", "license",
    "created_at", "chosen_by",
)  # fmt: skip
JUDGEMENT_COLUMNS = (
    "id", "item_id", "annotator_id", "answer", "ranks", "strength", "demonstration", "reason",
    "rationale", "criteria", "shown_order", "duration_s", "guideline_version", "guideline_sha256",
    "consent", "source", "judge", "created_at", "supersedes",
)  # fmt: skip


def item_row(item: Item) -> tuple[Any, ...]:
    return (
        item.id, prompt_hash(item.messages), json_text([dict(m) for m in item.messages]),
        completions_text(item.completions), item.topic,
        json_text(asdict(item.gold)) if item.gold is not None else None,
        item.source, item.license, item.created_at,
        json_text(asdict(item.chosen_by)) if item.chosen_by is not None else None,
    )  # fmt: skip


def completions_text(completions: Iterable[Candidate]) -> str:
    return json_text([asdict(completion) for completion in completions])


def item_from(row: sqlite3.Row) -> Item:
    gold = json.loads(row["gold"]) if row["gold"] is not None else None
    chosen_by = json.loads(row["chosen_by"]) if row["chosen_by"] is not None else None
    return Item(
        id=row["id"],
        messages=tuple(json.loads(row["messages"])),
        completions=tuple(Candidate(**fields) for fields in json.loads(row["completions"])),
        topic=row["topic"],
        gold=None if gold is None else Gold(ranks=tuple(gold["ranks"]), why=gold["why"]),
        source=row["source"],
        license=row["license"],
        created_at=row["created_at"],
        chosen_by=None if chosen_by is None else ChosenBy(**chosen_by),
    )


def judgement_row(judgement: Judgement) -> tuple[Any, ...]:
    fields = {name: getattr(judgement, name) for name in JUDGEMENT_COLUMNS}
    fields["ranks"] = json_text(list(judgement.ranks)) if judgement.ranks else None
    fields["criteria"] = json_text(dict(judgement.criteria))
    fields["judge"] = None if judgement.judge is None else json_text(dict(judgement.judge))
    return tuple(fields.values())


def judgement_from(row: sqlite3.Row) -> Judgement:
    fields = {name: row[name] for name in JUDGEMENT_COLUMNS}
    fields["ranks"] = _ranks(row["ranks"]) if row["ranks"] else ()
    fields["criteria"] = json.loads(row["criteria"]) if row["criteria"] != "{}" else {}
    fields["judge"] = json.loads(row["judge"]) if row["judge"] is not None else None
    return Judgement(**fields)


@lru_cache(maxsize=1024)
def _ranks(text: str) -> tuple[int, ...]:
    """Hundreds of thousands of judgements share a few orders."""
    return tuple(json.loads(text))


def json_text(value: Any) -> str:
    """The same value always gives the same text."""
    return json.dumps(value, ensure_ascii=True, sort_keys=True, allow_nan=False)
