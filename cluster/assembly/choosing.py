"""Completions in a file -> the pairs that people, or a judge, are asked about next."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cluster.contracts.chat import is_text
from cluster.contracts.config.choice import ChoiceConfig
from cluster.contracts.config.reward import RewardModelSource
from cluster.contracts.durable import write_text
from cluster.contracts.errors import UserError
from cluster.machine.cores import own_cores
from cluster.pages.labelling.items import read_groups
from cluster.runs.run import require_writable
from reward_service.preferences.choice import (
    MISMATCHED,
    CompletionGroup,
    Scores,
    choose_pairs,
    item_of,
)
from reward_service.preferences.records import LETTERS, Item, prompt_hash, utc_now
from reward_service.source import ScoreItem


def chosen_items(
    path: str,
    config: ChoiceConfig,
    *,
    seed: int,
    license: str = "unknown",
    split: str = "train",
    asked: Collection[str] = (),
) -> list[Item]:
    """The items that ask for the chosen pairs of a file, the most wanted first. asked: ids of items
    that are not asked again.

    Raises UserError for a file without two different completions of a prompt, and for a reward
    model that is missing or cannot be used.
    """
    check_choice(config)
    groups = read_groups(path, split)
    scores = None
    if config.needs_scores:
        assert config.reward_model is not None
        scores = rewards_of(groups, config.reward_model)
    pairs = choose_pairs(groups, config, seed, scores, asked)
    if not pairs:
        raise UserError(
            "holds no prompt with two different completions to compare"
            + (", but those that were asked before" if asked else ""),
            where=path,
            fix="sample more: accord generate MODEL PROMPTS --samples 4",
        )
    now, source = utc_now(), Path(path).name
    return [item_of(groups, p, source=source, license=license, created_at=now) for p in pairs]


def check_choice(config: ChoiceConfig) -> None:
    """Raises UserError where the strategy and the reward model do not go together."""
    where = f"strategy {config.strategy!r} of the choice of pairs"
    if config.needs_scores and config.reward_model is None:
        raise UserError(
            "it asks a reward model, and none is named",
            where=where,
            fix="set reward_model to a directory made by `accord reward-model`",
        )
    if not config.needs_scores and config.reward_model is not None:
        raise UserError("it asks no reward model", where=where, fix="leave reward_model out")


def rewards_of(groups: Sequence[CompletionGroup], reward_model: str) -> list[Scores]:
    """Of each group [M, K]: the rewards of its M completions by the K members of the reward model.
    They are not normalised, so that differences are log-odds of the Bradley-Terry model."""
    from reward_service.sources.model import ModelScorer

    source = RewardModelSource(path=reward_model, normalise=False)
    scorer = ModelScorer(source, threads=len(own_cores()))
    rows = [
        ScoreItem(
            id=f"{number}/{place}", messages=group.messages, response=completion.text,
            where=f"completion {place} of prompt {number}",
        )
        for number, group in enumerate(groups)
        for place, completion in enumerate(group.completions)
    ]  # fmt: skip
    parts = scorer.score(rows)
    scores = np.array([_members(part.value, part.detail) for part in parts], dtype=np.float64)
    ends = np.cumsum([len(group.completions) for group in groups])
    return np.split(scores, ends[:-1])


def _members(value: float, detail: Any) -> list[float]:
    found = [one for name, one in detail.items() if name.startswith("member")]
    return found or [value]


def write_items(items: Sequence[Item], out: Path) -> None:
    """One JSON line per item, as `accord label` and `accord ai-label` read them."""
    require_writable(out)
    rows = (json.dumps(_row(item), ensure_ascii=False) for item in items)
    write_text(out, "".join(f"{row}\n" for row in rows))


def _row(item: Item) -> dict[str, Any]:
    text = is_text(item.messages)
    row: dict[str, Any] = {
        "prompt": item.messages[0]["content"] if text else [dict(m) for m in item.messages]
    }
    for letter, completion in zip(LETTERS, item.completions, strict=False):
        row[f"completion_{letter}"] = completion.text
        row[f"policy_version_{letter}"] = completion.policy_version
        row[f"sampling_{letter}"] = completion.sampling
    row["topic"] = item.topic
    row["chosen_by"] = None if item.chosen_by is None else asdict(item.chosen_by)
    return row


def choice_told(items: Sequence[Item]) -> str:
    """What was chosen, in one line."""
    reasons = [item.chosen_by for item in items if item.chosen_by is not None]
    wrong = sum(reason.strategy == MISMATCHED for reason in reasons)
    twice = sum(reason.judgements > 1 for reason in reasons)
    prompts = len({prompt_hash(item.messages) for item in items})
    return (
        f"{len(items)} pairs of {prompts} prompts; {wrong} mismatched; {twice} for two annotators"
    )
