"""Loss and scores of one reward model: a trunk with one head or more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.contracts.config.offline import RewardModelConfig
from cluster.contracts.metrics import Metric, last, mean
from learner.algorithms.loss_terms import metric_parts
from learner.algorithms.reward_loss import bradley_terry, plackett_luce, rao_kupper_tie
from learner.compute.mesh import ALONE, Mesh
from learner.compute.microbatches import PaddedRows, TokenRow, pad_rows
from learner.compute.optimizer import compute_in
from learner.compute.optimizer_step import metrics_of
from learner.compute.sharding import bare, call
from learner.evaluation.calibration import confidences, ece
from learner.models.heads import LmHead, hidden_states, scores_of_states
from learner.offline.reward_rows import RewardRow
from learner.offline.shares import shares

CALIBRATION_BINS = 20
"""Over [0, 1]; certainty is never under 0.5, so that 10 of them can hold pairs."""

Scores = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RewardTask:
    """model: may be `Gathered`. lm_head: the starting policy's, for the likelihood term; None
    without one."""

    model: Any
    config: RewardModelConfig
    device: torch.device
    lm_head: LmHead | None = None
    mesh: Mesh = ALONE

    def forward(self, rows: Sequence[TokenRow]) -> tuple[Tensor, Tensor, PaddedRows]:
        """([B, K] raw scores, [B, T, H] hidden states, the batch) of one padded forward."""
        pad_id = bare(self.model).config.get_text_config().pad_token_id
        batch = pad_rows(rows, pad_id, self.device)
        with compute_in(self.config.model.dtype, self.device):
            scores, hidden = call(self.model, _scores_and_states, batch)
        return scores, hidden, batch

    def loss(self, rows: Sequence[RewardRow], denominator: float) -> tuple[Tensor, list[Metric]]:
        scores, hidden, batch = self.forward([side for row in rows for side in row.ranked])
        places = _places(rows, self.device)
        ranked = scores[places.clamp(min=0)].permute(2, 0, 1)  # [K, N, M]
        losses = self._losses(rows, ranked, (places >= 0).expand_as(ranked))
        weight = scores.new_tensor([row.weight for row in rows])
        drawn = scores.new_tensor([row.heads or (1.0,) * len(ranked) for row in rows]).T
        total = (losses * weight * drawn).mean(dim=0).sum()
        if self.lm_head is not None:
            best = places[:, 0]
            total = total + self.config.nll_coef * (weight * self._nll(hidden, batch, best)).sum()
        metrics = self._metrics(rows, ranked.mean(dim=0), places)
        measured = mean("train/loss", float(total.detach()), float(weight.sum()))
        return total / denominator, [measured, *metrics]

    def _losses(self, rows: Sequence[RewardRow], ranked: Tensor, present: Tensor) -> Tensor:
        """[K, N] losses of rankings [K, N, M], the best first."""
        config = self.config
        first, second = ranked[..., 0], ranked[..., 1]
        margin = ranked.new_tensor([row.margin for row in rows]) + config.tie_threshold
        pairs = bradley_terry(
            first, second, margin.expand_as(first), config.centre_coef, config.label_smoothing
        )
        tie = torch.tensor([row.tie for row in rows], device=self.device)
        if config.tie_threshold and bool(tie.any()):
            ties = rao_kupper_tie(first, second, config.tie_threshold)
            centring = config.centre_coef * (first + second).square()
            pairs = torch.where(tie, ties + centring, pairs)
        if ranked.shape[-1] == 2:
            return pairs
        count = present.sum(dim=-1)
        whole = plackett_luce(ranked, present)
        # Of two scores, (2 mean)^2 is the pair's (chosen + rejected)^2.
        centre = 2 * ranked.where(present, 0.0).sum(dim=-1) / count
        return torch.where(count > 2, whole + config.centre_coef * centre.square(), pairs)

    def _nll(self, hidden: Tensor, batch: PaddedRows, best: Tensor) -> Tensor:
        """[N] negative log-likelihood per token of each row's best completion."""
        assert self.lm_head is not None
        wanted = batch.loss_mask[best, 1:]
        states = hidden[best, :-1][wanted]
        logp, _ = self.lm_head.logprobs(states, batch.input_ids[best, 1:][wanted])
        spread = logp.new_zeros(wanted.shape).masked_scatter(wanted, logp)
        return -spread.sum(dim=1) / wanted.sum(dim=1)

    def _metrics(self, rows: Sequence[RewardRow], ranked: Tensor, places: Tensor) -> list[Metric]:
        """Of the best against the worst of each row, by the members' mean; a tie is wrong."""
        best = ranked[:, 0]
        worst = ranked.gather(1, ((places >= 0).sum(dim=1) - 1)[:, None])[:, 0]
        decided = torch.tensor([not row.tie for row in rows], device=self.device)
        return metrics_of(
            {
                "accuracy": metric_parts(best > worst, decided),
                "margin": metric_parts(best - worst, decided),
                "reward_chosen": metric_parts(best, decided),
                "reward_rejected": metric_parts(worst, decided),
            },
            "train/",
        )

    @torch.no_grad()
    def score_all(self, rows: Sequence[TokenRow]) -> Scores:
        """[N, K] raw scores in the order of `rows`, on every process."""
        heads = bare(self.model).config.num_labels
        scores = torch.zeros(len(rows), heads, dtype=torch.float64, device=self.device)
        budget = self.config.fit.tokens_per_microbatch
        for part, counts in shares([len(row) for row in rows], budget, self.mesh.data):
            found = self.forward([rows[i] for i in part])[0]
            if counts:
                scores[part] = found.double()
        self.mesh.data.sum_([scores])
        return scores.cpu().numpy()

    def score_rows(self, rows: Sequence[RewardRow]) -> list[Scores]:
        """[M, K] raw scores of each row's completions."""
        if not rows:
            return []
        scores = self.score_all([side for row in rows for side in row.ranked])
        ends = np.cumsum([len(row.ranked) for row in rows])
        return np.split(scores, ends[:-1]) if rows else []

    def evaluate(self, rows: Sequence[RewardRow]) -> list[Metric]:
        """rm/{loss,accuracy,margin,ece,...} of all pairs that the rows order."""
        return pair_metrics(rows, [scores.mean(axis=1) for scores in self.score_rows(rows)])


def _scores_and_states(model: Any, batch: PaddedRows) -> tuple[Tensor, Tensor]:
    hidden = hidden_states(model, batch.input_ids, batch.attention_mask)
    return scores_of_states(model, hidden, batch.attention_mask), hidden


def pair_metrics(rows: Sequence[RewardRow], scores: Sequence[Scores]) -> list[Metric]:
    """rm/{loss,accuracy,margin,ece,reward_chosen,reward_rejected} of rows whose completions have
    these scores [M]. The loss is the plain one, without margin and centring, so that runs compare.
    No pair, no metrics."""
    pairs = [
        (own[better], own[worse])
        for row, own in zip(rows, scores, strict=True)
        for better, worse in row.pairs()
    ]
    if not pairs:
        return []
    chosen, rejected = np.array(pairs).T
    gaps = chosen - rejected
    loss = np.logaddexp(0.0, -gaps)
    found = {
        "loss": loss, "accuracy": gaps > 0, "margin": gaps,
        "reward_chosen": chosen, "reward_rejected": rejected,
    }  # fmt: skip
    return [
        *(mean(f"rm/{name}", float(values.sum()), len(gaps)) for name, values in found.items()),
        last("rm/ece", ece(*confidences(gaps), CALIBRATION_BINS)),
    ]


def _places(rows: Sequence[RewardRow], device: torch.device) -> Tensor:
    """[N, M] where each row's completions stand in the batch; -1 beyond a row's last."""
    width = max(len(row.ranked) for row in rows)
    table, start = [], 0
    for row in rows:
        count = len(row.ranked)
        table.append([*range(start, start + count), *[-1] * (width - count)])
        start += count
    return torch.tensor(table, device=device)
