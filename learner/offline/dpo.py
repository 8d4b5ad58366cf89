"""Direct preference optimisation against the frozen starting policy (Rafailov et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.contracts.config.offline import DpoConfig
from cluster.contracts.metrics import Metric, mean
from learner.algorithms.loss_terms import LossTerms
from learner.algorithms.preference_loss import dpo
from learner.compute.microbatches import TokenRow, pad_rows, plan_microbatches
from learner.compute.optimizer import compute_in
from learner.compute.optimizer_step import metrics_of
from learner.models.heads import token_logprobs
from learner.models.load import load_policy, load_tokenizer, save_policy
from learner.offline.datasets import Comparison, read_comparisons
from learner.offline.fit import OnStep, evaluate_rows, fit, never
from learner.offline.setup import OnRows, answered, load_rows, prepare, unheard, write_summary


@dataclass(frozen=True, slots=True)
class DpoRow:
    """A pair, and the reference's log-probability of each answer, summed over its tokens."""

    chosen: TokenRow
    rejected: TokenRow
    ref_chosen: float = 0.0
    ref_rejected: float = 0.0

    def __len__(self) -> int:
        return 2 * self.longest

    @property
    def longest(self) -> int:
        return max(len(self.chosen), len(self.rejected))

    @property
    def weight(self) -> float:
        return 1.0


def train_dpo(
    config: DpoConfig,
    run_dir: Path,
    progress: OnStep | None = None,
    should_stop: Callable[[], bool] = never,
    on_rows: OnRows = unheard,
) -> Path:
    """Optimise config.model on preference pairs; returns run_dir/policy.

    The reference is the starting policy; its log-probabilities are computed once, before the first
    step. Reports train/loss, rewards/{chosen,rejected,accuracies,margins}, logps/{chosen,rejected}
    and the same of the held-out pairs under eval/. Stops and continues as `train_sft` does.
    """
    device = prepare(config.fit, config.run.seed)
    tokenizer = load_tokenizer(config.model)
    skip_bad = config.data.skip_bad_rows
    read = read_comparisons(config.data.path, config.data.split, skip_bad)
    data = load_rows(read, tokenizer, encode, lambda row: row.longest, config.fit, skip_bad)
    on_rows(data)
    task = DpoTask(load_policy(config.model).to(device), config, device)
    rows, eval_rows = task.with_reference(data.train), task.with_reference(data.held)
    run_dir.mkdir(parents=True, exist_ok=True)
    result = fit(
        task.policy,
        rows,
        task.loss,
        config.fit,
        seed=config.run.seed,
        evaluate=task.evaluation(eval_rows),
        on_step=progress,
        should_stop=should_stop,
        checkpoint=run_dir / "checkpoints",
    )
    write_summary(run_dir, result, data)
    return save_policy(task.policy, tokenizer, run_dir / "policy")


def encode(tokenizer: Any, row: Comparison) -> DpoRow:
    return DpoRow(
        chosen=answered(tokenizer, row.messages, row.chosen),
        rejected=answered(tokenizer, row.messages, row.rejected),
    )


@dataclass(frozen=True, slots=True)
class DpoTask:
    policy: Any
    config: DpoConfig
    device: torch.device

    def logps(self, rows: Sequence[DpoRow]) -> tuple[Tensor, Tensor]:
        """([N] chosen, [N] rejected) log-probabilities of the answers, one forward for both."""
        both = [row.chosen for row in rows] + [row.rejected for row in rows]
        with compute_in(self.config.model.dtype, self.device):
            logp, _, _ = token_logprobs(self.policy, pad_rows(both, 0, self.device))
        chosen, rejected = logp.sum(dim=1).chunk(2)
        return chosen, rejected

    @torch.no_grad()
    def with_reference(self, rows: Sequence[DpoRow]) -> list[DpoRow]:
        """The rows with log-probabilities of the policy as it is now."""
        done: dict[int, DpoRow] = {}
        budget = self.config.fit.tokens_per_microbatch
        for part in plan_microbatches([len(row) for row in rows], budget):
            chosen, rejected = self.logps([rows[i] for i in part])
            for i, c, r in zip(part, chosen.tolist(), rejected.tolist(), strict=True):
                done[i] = replace(rows[i], ref_chosen=c, ref_rejected=r)
        return [done[i] for i in range(len(rows))]

    def terms(self, rows: Sequence[DpoRow]) -> LossTerms:
        chosen, rejected = self.logps(rows)
        return dpo(
            chosen,
            rejected,
            chosen.new_tensor([row.ref_chosen for row in rows]),
            rejected.new_tensor([row.ref_rejected for row in rows]),
            self.config.beta,
            self.config.label_smoothing,
            self.config.loss,
        )

    def loss(self, rows: Sequence[DpoRow], denominator: float) -> tuple[Tensor, list[Metric]]:
        terms = self.terms(rows)
        total = terms.losses.sum()
        measured = mean("train/loss", float(total.detach()), len(rows))
        return total / denominator, [measured, *metrics_of(terms.metrics)]

    def evaluation(self, rows: Sequence[DpoRow]) -> Callable[[], list[Metric]] | None:
        if not rows:
            return None
        budget = self.config.fit.tokens_per_microbatch
        return lambda: evaluate_rows(rows, self.measure, budget)

    def measure(self, rows: Sequence[DpoRow]) -> list[Metric]:
        terms = self.terms(rows)
        loss = mean("eval/loss", float(terms.losses.sum()), len(rows))
        return [loss, *metrics_of(terms.metrics, "eval/")]
