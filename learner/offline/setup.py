"""What SFT, reward model and DPO have in common around `fit`: device, lengths, the summary."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from cluster.contracts.chat import TemplateRefusal, is_text, render_answered, require_template
from cluster.contracts.config.base import ModelConfig
from cluster.contracts.config.offline import (
    DpoConfig,
    FitConfig,
    RewardModelConfig,
    SftConfig,
)
from cluster.contracts.rows.files import BadRow
from cluster.contracts.rows.messages import Messages
from cluster.contracts.rows.reader import NOTHING, LeftOut, ReadRows
from cluster.machine.torch_state import prepare_torch
from learner.compute.mesh import Mesh
from learner.compute.microbatches import TokenRow, token_row
from learner.compute.ranks import SINGLE, Ranks
from learner.models.load import load_policy
from learner.models.placement import Placement
from learner.offline.datasets import hold_out
from learner.offline.fit import FitResult

SUMMARY = "fit.json"
TrainedConfig = SftConfig | RewardModelConfig | DpoConfig


class Source(Protocol):
    @property
    def where(self) -> str: ...

    @property
    def messages(self) -> Messages: ...


class Keyed(Source, Protocol):
    @property
    def key(self) -> str: ...


S = TypeVar("S", bound=Source)
K = TypeVar("K", bound=Keyed)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Encoded(Generic[T]):
    """Rows with token ids; how many were too long; which were bad."""

    rows: list[T]
    too_long: int
    left_out: LeftOut


@dataclass(frozen=True, slots=True)
class TrainingRows(Generic[T]):
    """What a task trains on and what it is evaluated on; what was left out of both."""

    train: list[T]
    held: list[T]
    too_long: int
    left_out: LeftOut


OnRows = Callable[[TrainingRows[Any]], None]
"""Told once, before the first step, which rows there are."""


def unheard(rows: TrainingRows[Any]) -> None:
    """An ``OnRows`` for callers who do not ask."""


def prepare(config: FitConfig, seed: int) -> torch.device:
    """Threads, product precision, seed; the device to train on: the current one of torch, which
    `learner.compute.ranks.join` has set."""
    prepare_torch(config.threads)
    torch.manual_seed(seed)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def place_of(config: TrainedConfig, ranks: Ranks, device: torch.device) -> Placement:
    """Where the models of a fit lie; every one of the processes has to ask."""
    fit, model = config.fit, config.model
    tensor, sequence = fit.tensor_parallel, fit.sequence_parallel
    return Placement(
        compute=fit,
        device=device,
        dtype=model.dtype,
        mesh=Mesh.of(ranks, tensor=tensor, sequence=sequence, device=device),
        lora=config.lora,
        seed=config.run.seed,
    )


def policy_at(place: Placement, model: ModelConfig, *, frozen: bool = False) -> Any:
    """A policy to be trained, or a frozen one: what its forward passes go through (see
    `learner.compute.sharding.call`), which `bare` makes the model again."""
    if place.in_parts:
        return place.load_policy(model, frozen=frozen)[1]
    policy = load_policy(model).requires_grad_(not frozen)
    return made_ready(place, policy, frozen=frozen)


def made_ready(place: Placement, model: Any, *, frozen: bool = False) -> Any:
    """A whole model on its device, with adapters where a fit trains those."""
    if not frozen:
        place.adapt(model)
    model = model.to(place.device)
    place.ready(model, frozen=frozen)
    return model


def encode_all(
    rows: Iterable[S],
    tokenizer: Any,
    encode: Callable[[Any, S], T],
    longest: Callable[[T], int],
    max_tokens: int,
    skip_bad: bool = False,
) -> Encoded[T]:
    """The rows with token ids. A row of over `max_tokens` tokens is left out and counted; so is one
    that `encode` or the chat template refuses, with `skip_bad`.

    Raises UserError naming the row otherwise, and for chat data with a tokenizer that has no
    template.
    """
    kept: list[T] = []
    too_long, left_out = 0, NOTHING
    for row in rows:
        if not is_text(row.messages):
            require_template(tokenizer, row.where)
        try:
            encoded = encode(tokenizer, row)
        except (BadRow, TemplateRefusal) as problem:
            left_out = left_out.with_row(problem, row.where, skip_bad=skip_bad)
            continue
        if longest(encoded) > max_tokens:
            too_long += 1
        else:
            kept.append(encoded)
    return Encoded(kept, too_long, left_out)


def load_rows(
    read: ReadRows[K],
    tokenizer: Any,
    encode: Callable[[Any, K], T],
    longest: Callable[[T], int],
    config: FitConfig,
    skip_bad: bool,
) -> TrainingRows[T]:
    """What was read, split into training and held-out rows, with token ids."""
    train, held = hold_out(read.items, config.eval_fraction)
    sides = [
        encode_all(side, tokenizer, encode, longest, config.max_tokens, skip_bad)
        for side in (train, held)
    ]
    left_out = read.left_out
    for side in sides:
        left_out = left_out.and_also(side.left_out)
    too_long = sum(side.too_long for side in sides)
    return TrainingRows(sides[0].rows, sides[1].rows, too_long, left_out)


def answered(tokenizer: Any, messages: Messages, answer: str) -> TokenRow:
    """Prompt and answer with its end token as one row, the answer trained. Raises BadRow."""
    prompt, ids = render_answered(tokenizer, messages, answer)
    if not prompt:
        raise BadRow("the tokenizer makes no token of the prompt")
    return token_row([*prompt, *ids], [False] * len(prompt) + [True] * len(ids))


def write_summary(
    run_dir: Path, result: FitResult, data: TrainingRows[Any], ranks: Ranks = SINGLE
) -> None:
    """`fit.json` of the run: how far it came, on how many rows, with which last evaluation."""
    if not ranks.first:
        return
    content = {
        "finished": result.finished,
        "steps": result.steps,
        "seconds": round(result.seconds, 3),
        "skipped_steps": result.skipped_steps,
        "rows": len(data.train),
        "rows_held_out": len(data.held),
        "rows_too_long": data.too_long,
        "rows_bad": data.left_out.count,
        "evaluation": dict(result.numbers),
    }
    partial = run_dir / f".{SUMMARY}.part"
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(run_dir / SUMMARY)
