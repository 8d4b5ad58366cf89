"""Supervised fine-tuning: the log-likelihood of what the assistant wrote, per token of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.contracts.chat import is_text, render_conversation, render_prompt
from cluster.contracts.config.offline import SftConfig
from cluster.contracts.metrics import Metric, mean
from cluster.contracts.rows.files import BadRow
from learner.algorithms.logprobs import logprobs_from_logits
from learner.algorithms.masked import aggregate
from learner.compute.mesh import ALONE, Mesh
from learner.compute.microbatches import PaddedRows, TokenRow, pad_rows, token_row
from learner.compute.optimizer import compute_in
from learner.compute.ranks import SINGLE, Ranks
from learner.compute.sharding import call
from learner.models.heads import hidden_states, lm_head, token_logprobs
from learner.models.load import load_tokenizer
from learner.offline.datasets import Demonstration, read_demonstrations
from learner.offline.fit import OnStep, evaluate_rows, fit, never
from learner.offline.saving import save_trained
from learner.offline.setup import (
    OnRows,
    TrainingRows,
    answered,
    load_rows,
    place_of,
    policy_at,
    prepare,
    unheard,
    write_summary,
)

_ACCURACY_CHUNK = 1024
"""Positions whose logits are held at once when accuracy is measured."""


def train_sft(
    config: SftConfig,
    run_dir: Path,
    progress: OnStep | None = None,
    should_stop: Callable[[], bool] = never,
    on_rows: OnRows = unheard,
    ranks: Ranks = SINGLE,
    rows: TrainingRows[TokenRow] | None = None,
) -> Path:
    """Fine-tune config.model on config.data; returns run_dir/policy, a complete model directory;
    with config.lora also run_dir/adapter, which peft, transformers and vLLM load.

    Continues from run_dir/checkpoints if there are any. Reports train/loss, eval/loss (nats a
    token) and eval/accuracy (share of tokens that are the most likely one). Stopped early by
    `should_stop`, it still saves a checkpoint and the policy of that moment (`fit.json` then says
    finished: false). Each of several ranks calls it alike; the first one reports and writes.
    rows: what `read_rows` has read; None: they are read here.
    """
    device = prepare(config.fit, config.run.seed)
    tokenizer = load_tokenizer(config.model)
    data = rows or read_rows(config)
    on_rows(data)
    place = place_of(config, ranks, device)
    policy = policy_at(place, config.model)
    task = SftTask(policy, config.model.dtype, device, place.mesh)
    run_dir.mkdir(parents=True, exist_ok=True)
    result = fit(
        policy,
        [SftRow(row) for row in data.train],
        task.loss,
        config.fit,
        seed=config.run.seed,
        evaluate=task.evaluation([SftRow(row) for row in data.held], config),
        on_step=progress,
        should_stop=should_stop,
        checkpoint=run_dir / "checkpoints",
        mesh=place.mesh,
    )
    write_summary(run_dir, result, data, ranks)
    return save_trained(policy, tokenizer, run_dir, config.model.path, ranks)


def read_rows(config: SftConfig) -> TrainingRows[TokenRow]:
    """The demonstrations of a config, split and with token ids."""
    skip_bad = config.data.skip_bad_rows
    read = read_demonstrations(config.data.path, config.data.split, skip_bad)
    tokenizer = load_tokenizer(config.model)
    return load_rows(read, tokenizer, encode, len, config.fit, skip_bad)


def encode(tokenizer: Any, row: Demonstration) -> TokenRow:
    """Ids and loss mask: the assistant's turns with their end tokens, or a whole plain text."""
    if not is_text(row.messages):
        ids, mask = render_conversation(tokenizer, row.messages)
        encoded = token_row(ids, mask)
    elif row.answer is not None:
        encoded = answered(tokenizer, row.messages, row.answer)
    else:
        ids = [*render_prompt(tokenizer, row.messages), tokenizer.eos_token_id]
        encoded = token_row(ids, [True] * len(ids))
    if encoded.trained == 0:
        raise BadRow("has no token to learn from")
    return encoded


@dataclass(frozen=True, slots=True)
class SftRow:
    """A row as the loop sees it: its length, and its trained tokens as weight."""

    tokens: TokenRow

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def weight(self) -> float:
        return self.tokens.trained


@dataclass(frozen=True, slots=True)
class SftTask:
    """Loss and evaluation of a policy, which may be `Gathered`; `dtype` is what is computed in."""

    policy: Any
    dtype: str
    device: torch.device
    mesh: Mesh = ALONE

    def loss(self, rows: Sequence[SftRow], denominator: float) -> tuple[Tensor, list[Metric]]:
        batch = pad_rows([row.tokens for row in rows], 0, self.device)
        with compute_in(self.dtype, self.device):
            logp, _, _ = call(self.policy, token_logprobs, batch)
        loss = aggregate(-logp, batch.loss_mask, "token-mean", denominator)
        tokens = sum(row.weight for row in rows)
        return loss, [mean("train/loss", float(loss.detach()) * denominator, tokens)]

    def evaluation(
        self, rows: Sequence[SftRow], config: SftConfig
    ) -> Callable[[], list[Metric]] | None:
        if not rows:
            return None
        budget = config.fit.tokens_per_microbatch
        return lambda: evaluate_rows(rows, self.measure, budget, self.mesh)

    def measure(self, rows: Sequence[SftRow]) -> list[Metric]:
        """eval/loss and eval/accuracy of some rows."""
        batch = pad_rows([row.tokens for row in rows], 0, self.device)
        with compute_in(self.dtype, self.device):
            total, right = call(self.policy, _loss_and_hits, batch)
        count = sum(row.tokens.trained for row in rows)
        return [mean("eval/loss", float(total), count), mean("eval/accuracy", float(right), count)]


def _loss_and_hits(policy: Any, batch: PaddedRows) -> tuple[Tensor, Tensor]:
    """(0-d float64 sum of the trained tokens' losses, 0-d int64 number of those that are the most
    likely one)."""
    hidden = hidden_states(policy, batch.input_ids, batch.attention_mask)
    wanted = batch.loss_mask[:, 1:]
    states, labels = hidden[:, :-1][wanted], batch.input_ids[:, 1:][wanted]
    head = lm_head(policy)
    total = states.new_zeros((), dtype=torch.float64)
    right = labels.new_zeros(())
    for part, target in zip(
        states.split(_ACCURACY_CHUNK), labels.split(_ACCURACY_CHUNK), strict=True
    ):
        logits = head.logits(part)
        total = total - logprobs_from_logits(logits, target).double().sum()
        right = right + (logits.argmax(dim=-1) == target).sum()
    return total, right
