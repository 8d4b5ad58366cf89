"""`accord dpo`: a policy trained directly on preferences (`learner.algorithms.preference_loss`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.contracts.config.offline import DpoConfig
from cluster.contracts.errors import UserError
from cluster.contracts.metrics import Metric, last, mean
from cluster.contracts.plugins import guarded
from cluster.contracts.registry import PREFERENCE_LOSSES
from learner.algorithms import preference_loss
from learner.algorithms.loss_terms import LossTerms, metric_parts
from learner.compute.mesh import ALONE, Mesh
from learner.compute.microbatches import TokenRow
from learner.compute.optimizer_step import metrics_of
from learner.compute.ranks import SINGLE, Ranks
from learner.models.load import load_tokenizer
from learner.models.lora import without_adapters
from learner.models.placement import Placement
from learner.offline.completion_logps import all_completion_logps, completion_logps
from learner.offline.datasets import read_preferences
from learner.offline.fit import FitResult, OnStep, evaluate_rows, fit, never
from learner.offline.own_samples import measure_own_samples
from learner.offline.preference_rows import (
    PreferenceRow,
    encode,
    encode_judged,
    mismatch,
    prompt_of,
)
from learner.offline.saving import save_trained
from learner.offline.setup import (
    OnRows,
    TrainingRows,
    load_rows,
    place_of,
    policy_at,
    prepare,
    unheard,
    write_summary,
)


def train_dpo(
    config: DpoConfig,
    run_dir: Path,
    progress: OnStep | None = None,
    should_stop: Callable[[], bool] = never,
    on_rows: OnRows = unheard,
    ranks: Ranks = SINGLE,
    rows: TrainingRows[PreferenceRow] | None = None,
) -> Path:
    """Train config.model on preferences; returns run_dir/policy.

    The reference is the starting policy; its log-probabilities are computed once, before the first
    step. Reports train/loss, rewards/{chosen,rejected,accuracies,margins}, logps/{chosen,rejected},
    with KTO kto/kl, and the same of the held-out rows under eval/. At the end eval/kl and
    eval/length, see `measure_own_samples`. Stops, continues and takes `rows` as `train_sft` does.
    """
    device = prepare(config.fit, config.run.seed)
    tokenizer = load_tokenizer(config.model)
    data = rows or read_rows(config)
    on_rows(data)
    place = place_of(config, ranks, device)
    policy = policy_at(place, config.model)
    task = DpoTask(policy, config, device, mesh=place.mesh)
    train, held = task.with_reference(data.train), task.with_reference(data.held)
    run_dir.mkdir(parents=True, exist_ok=True)
    result = fit(
        policy,
        train,
        task.loss,
        config.fit,
        seed=config.run.seed,
        before_step=task.measure_reference_point,
        evaluate=task.evaluation(held),
        on_step=progress,
        should_stop=should_stop,
        checkpoint=run_dir / "checkpoints",
        mesh=place.mesh,
    )
    if result.finished and held and config.kl_samples:
        result = _with_own_samples(result, task, place, tokenizer, held)
        if progress is not None:
            progress(result.steps, 1.0, result.numbers)
    write_summary(run_dir, result, data, ranks)
    return save_trained(policy, tokenizer, run_dir, config.model.path, ranks)


def read_rows(config: DpoConfig) -> TrainingRows[PreferenceRow]:
    """The preferences of a config, split and with token ids, as its loss takes them."""
    tokenizer = load_tokenizer(config.model)
    skip_bad, kto = config.data.skip_bad_rows, config.loss == "kto"
    read = read_preferences(config.data.path, config.data.split, skip_bad, singles=kto)
    encode_row = encode_judged if kto else encode
    data = load_rows(read, tokenizer, encode_row, lambda row: row.longest, config.fit, skip_bad)
    if not kto:
        return data
    seed, most = config.run.seed, config.fit.max_tokens
    return replace(
        data, train=mismatch(data.train, seed, most), held=mismatch(data.held, seed, most)
    )


@dataclass(slots=True)
class DpoTask:
    """Loss and evaluation of a policy, which may be `Gathered`. reference_point: KTO's estimate of
    the KL, for this step."""

    policy: Any
    config: DpoConfig
    device: torch.device
    reference_point: float = 0.0
    mesh: Mesh = ALONE

    def _all_logps(self, rows: Sequence[TokenRow | None]) -> list[float]:
        """Summed log-probabilities without gradients; 0 where there is no completion."""
        there = [row for row in rows if row is not None]
        config = self.config
        budget = config.fit.tokens_per_microbatch
        logps = all_completion_logps(
            self.policy, there, config.model.dtype, self.device, budget, self.mesh
        )
        found = iter(logps)
        return [0.0 if row is None else next(found) for row in rows]

    def with_reference(self, rows: Sequence[PreferenceRow]) -> list[PreferenceRow]:
        """The rows with log-probabilities of the policy as it is now, if the loss uses them."""
        if not self.config.uses_reference:
            return list(rows)
        chosen = self._all_logps([row.chosen for row in rows])
        rejected = self._all_logps([row.rejected for row in rows])
        mismatched = self._all_logps([row.mismatched for row in rows])
        return [
            replace(row, ref_chosen=c, ref_rejected=r, ref_mismatched=m)
            for row, c, r, m in zip(rows, chosen, rejected, mismatched, strict=True)
        ]

    def measure_reference_point(self, rows: Sequence[PreferenceRow]) -> None:
        """KTO: from all rows of a step, so that it does not depend on microbatches."""
        there = [row for row in rows if row.mismatched is not None]
        if there:
            now = torch.tensor(self._all_logps([row.mismatched for row in there]))
            ratios = now - torch.tensor([row.ref_mismatched for row in there])
            self.reference_point = preference_loss.kto_reference_point(ratios)

    def terms(self, rows: Sequence[PreferenceRow]) -> LossTerms:
        """One loss per row (KTO: the sum over its sides), and what is reported of the rows."""
        config, (has_chosen, has_rejected) = self.config, self._there(rows)
        chosen_rows = [row.chosen for row in rows if row.chosen is not None]
        rejected_rows = [row.rejected for row in rows if row.rejected is not None]
        both = [*chosen_rows, *rejected_rows]
        sums = completion_logps(self.policy, both, config.model.dtype, self.device)
        blank = sums.new_zeros(len(rows))
        chosen = blank.masked_scatter(has_chosen, sums[: len(chosen_rows)])
        rejected = blank.masked_scatter(has_rejected, sums[len(chosen_rows) :])
        tokens = (
            sums.new_tensor([_tokens(row.chosen) for row in rows]),
            sums.new_tensor([_tokens(row.rejected) for row in rows]),
        )
        seen = (
            self._seen(chosen, [row.ref_chosen for row in rows], tokens[0]),
            self._seen(rejected, [row.ref_rejected for row in rows], tokens[1]),
        )
        losses = self._losses(*seen, has_chosen, has_rejected)
        if config.nll_coef:
            losses = losses - config.nll_coef * chosen / tokens[0]
        rewards = (config.beta * seen[0], config.beta * seen[1])
        return LossTerms(
            losses=losses,
            metrics={
                **preference_loss.reward_metrics(*rewards, has_chosen, has_rejected),
                "logps/chosen": metric_parts(chosen, has_chosen),
                "logps/rejected": metric_parts(rejected, has_rejected),
            },
        )

    def _there(self, rows: Sequence[PreferenceRow]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor([row.chosen is not None for row in rows], device=self.device)
        rejected = torch.tensor([row.rejected is not None for row in rows], device=self.device)
        return chosen, rejected

    def _seen(self, logps: Tensor, reference: Sequence[float], tokens: Tensor) -> Tensor:
        """Log-probabilities as the loss takes them: see `learner.algorithms.preference_loss`."""
        ratios = logps - logps.new_tensor(reference)
        return ratios / tokens if self.config.uses_means else ratios

    def _losses(
        self, chosen: Tensor, rejected: Tensor, has_chosen: Tensor, has_rejected: Tensor
    ) -> Tensor:
        config = self.config
        if PREFERENCE_LOSSES[config.loss].function is not None:
            return _plugin_losses(config, chosen, rejected)
        if config.loss == "dpo":
            return preference_loss.dpo(chosen, rejected, config.beta, config.label_smoothing)
        if config.loss == "ipo":
            return preference_loss.ipo(chosen, rejected, config.beta)
        if config.loss == "orpo":
            return preference_loss.orpo(chosen, rejected, config.beta)
        if config.loss == "simpo":
            margin, smoothing = config.target_margin, config.label_smoothing
            return preference_loss.simpo(chosen, rejected, config.beta, margin, smoothing)
        good = preference_loss.kto(
            chosen, torch.ones_like(has_chosen), self.reference_point, config.beta,
            config.desirable_weight, config.undesirable_weight,
        )  # fmt: skip
        bad = preference_loss.kto(
            rejected, torch.zeros_like(has_rejected), self.reference_point, config.beta,
            config.desirable_weight, config.undesirable_weight,
        )  # fmt: skip
        return good.where(has_chosen, 0.0) + bad.where(has_rejected, 0.0)

    def loss(
        self, rows: Sequence[PreferenceRow], denominator: float
    ) -> tuple[Tensor, list[Metric]]:
        terms = self.terms(rows)
        return terms.losses.sum() / denominator, self._metrics(terms, rows, "train/loss", "")

    def evaluation(self, rows: Sequence[PreferenceRow]) -> Callable[[], list[Metric]] | None:
        if not rows:
            return None

        def evaluate() -> list[Metric]:
            self.measure_reference_point(rows)
            budget = self.config.fit.tokens_per_microbatch
            return evaluate_rows(rows, self.measure, budget, self.mesh)

        return evaluate

    def measure(self, rows: Sequence[PreferenceRow]) -> list[Metric]:
        return self._metrics(self.terms(rows), rows, "eval/loss", "eval/")

    def _metrics(
        self, terms: LossTerms, rows: Sequence[PreferenceRow], loss: str, prefix: str
    ) -> list[Metric]:
        total, count = float(terms.losses.detach().sum()), sum(row.weight for row in rows)
        found = [mean(loss, total, count), *metrics_of(terms.metrics, prefix)]
        if self.config.loss == "kto":
            found.append(last(f"{prefix}kto/kl", self.reference_point))
        return found


def _plugin_losses(config: DpoConfig, chosen: Tensor, rejected: Tensor) -> Tensor:
    """[N]. Raises UserError for what the plugin raises, and for anything but one loss per pair."""
    word, loss = config.loss, PREFERENCE_LOSSES[config.loss]
    assert loss.function is not None
    origin, what = PREFERENCE_LOSSES.origin(word), f"the preference loss {word!r}"
    shared = {key: getattr(config, key) for key in ("beta", "label_smoothing")}
    options = {key: value for key, value in shared.items() if key in loss.options}
    losses = guarded(loss.function, origin, what)(
        chosen, rejected, **options, **config.loss_options
    )
    if not isinstance(losses, Tensor) or losses.shape != chosen.shape:
        found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise UserError(
            f"{what} returned {found} for {len(chosen)} pairs",
            where=origin,
            fix="return a tensor with one loss per pair",
        )
    return losses


def _tokens(side: TokenRow | None) -> float:
    """Tokens of the completion; 1 where there is none, so that dividing by it stays finite."""
    return 1.0 if side is None else float(side.trained)


def _reference(task: DpoTask, place: Placement) -> AbstractContextManager[Any]:
    """The starting policy: what adapters were added to, or another model."""
    if place.lora is None:
        return nullcontext(policy_at(place, task.config.model, frozen=True))
    return without_adapters(task.policy)


def _with_own_samples(
    result: FitResult,
    task: DpoTask,
    place: Placement,
    tokenizer: Any,
    held: Sequence[PreferenceRow],
) -> FitResult:
    """The result with what is measured on completions that the trained policy writes. The reference
    is loaded for it only now, when gradients and moments have gone."""
    config = task.config
    prompts = list(dict.fromkeys(tuple(map(int, prompt_of(row.sides[0]))) for row in held))
    found = measure_own_samples(
        task.policy,
        _reference(task, place),
        tokenizer,
        prompts[: config.kl_samples],
        config.model,
        config.fit,
        seed=config.run.seed,
        device=task.device,
        mesh=task.mesh,
    )
    return replace(result, numbers={**result.numbers, **found})
