"""What SFT, reward model and DPO have in common around `fit`: device, lengths, the summary."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from cluster.contracts.chat import is_text, render_answered, require_template
from cluster.contracts.config.offline import FitConfig
from cluster.contracts.errors import UserError
from cluster.machine.torch_state import prepare_torch
from learner.compute.microbatches import Sequence as TokenRow
from learner.compute.microbatches import sequence
from learner.offline.datasets import Messages
from learner.offline.fit import FitResult

SUMMARY = "fit.json"


class Source(Protocol):
    @property
    def where(self) -> str: ...

    @property
    def messages(self) -> Messages: ...


S = TypeVar("S", bound=Source)
T = TypeVar("T")


def prepare(config: FitConfig, seed: int) -> torch.device:
    """Threads, product precision, seed; the device to train on."""
    prepare_torch(config.threads)
    torch.manual_seed(seed)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def encode_all(
    rows: Iterable[S],
    tokenizer: Any,
    encode: Callable[[Any, S], T],
    longest: Callable[[T], int],
    max_tokens: int,
) -> tuple[list[T], int]:
    """(encoded rows, how many were left out for having over max_tokens tokens).

    Raises UserError naming the row for chat data with a tokenizer that has no template.
    """
    kept, left_out = [], 0
    for row in rows:
        if not is_text(row.messages):
            require_template(tokenizer, row.where)
        encoded = encode(tokenizer, row)
        if longest(encoded) > max_tokens:
            left_out += 1
        else:
            kept.append(encoded)
    return kept, left_out


def answered(tokenizer: Any, messages: Messages, answer: str, where: str) -> TokenRow:
    """Prompt and answer with its end token as one row, the answer trained."""
    prompt, ids = render_answered(tokenizer, messages, answer)
    if not prompt:
        raise UserError("the prompt is empty", where=where, fix="leave the row out")
    return sequence([*prompt, *ids], [False] * len(prompt) + [True] * len(ids))


def write_summary(
    run_dir: Path, result: FitResult, *, rows: Sequence[Any], held_out: Sequence[Any], too_long: int
) -> None:
    """`fit.json` of the run: how far it came, on how many rows, with which last evaluation."""
    content = {
        "finished": result.finished,
        "steps": result.steps,
        "seconds": round(result.seconds, 3),
        "skipped_steps": result.skipped_steps,
        "rows": len(rows),
        "rows_held_out": len(held_out),
        "rows_too_long": too_long,
        "evaluation": dict(result.numbers),
    }
    partial = run_dir / f".{SUMMARY}.part"
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(run_dir / SUMMARY)
