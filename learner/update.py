"""One step's optimisation: epochs x minibatches x microbatches over a fixed experience.

Every loss is divided by the token or answer count of its whole MINIBATCH, so the result does not
depend on how the minibatch was cut into microbatches.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from cluster.contracts.metrics import Metric, largest, last, mean, merge, total
from learner.algorithms.kl import KL_ESTIMATORS, clamped_log_ratio
from learner.algorithms.masked import aggregate
from learner.algorithms.policy_loss import POLICY_LOSS_OPTIONS, POLICY_LOSSES
from learner.algorithms.terms import MetricParts
from learner.algorithms.value_loss import clipped_value_loss
from learner.batching import plan_microbatches
from learner.experience import Experience
from learner.forward import Microbatch, Networks, PolicyOutputs, make_microbatch, policy_outputs
from learner.settings import LearnerSettings
from learner.step import Microbatch as LossCall
from learner.step import SkipCounter, StepOutcome, metrics_of, optimiser_step

_LOSS = {"ppo": "ppo_clip", "reinforce": "reinforce", "cispo": "cispo", "gspo": "gspo"}
_RENAMED = {"policy/ratio": "policy/ratio_mean"}


@dataclass(slots=True, kw_only=True)
class Optimizers:
    """policy: also of a shared value head. value: of a value network of its own, else None."""

    policy: torch.optim.Optimizer
    value: torch.optim.Optimizer | None
    policy_skips: SkipCounter = field(default_factory=SkipCounter)
    value_skips: SkipCounter = field(default_factory=SkipCounter)

    @property
    def skipped(self) -> int:
        return self.policy_skips.total + self.value_skips.total


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """A minibatch: its rows and the denominator of its losses, of the WHOLE minibatch."""

    rows: list[int]
    tokens: int
    denominator: int


class PolicyUpdate:
    """Trains the networks on an experience. `value_only` steps leave the policy as it is."""

    def __init__(
        self, networks: Networks, optimizers: Optimizers, settings: LearnerSettings
    ) -> None:
        self.networks, self.optimizers, self.settings = networks, optimizers, settings
        algorithm = settings.algorithm
        name = _LOSS[algorithm.loss]
        self._loss = POLICY_LOSSES[name]
        given = {
            "eps_low": algorithm.clip_low,
            "eps_high": algorithm.clip_high,
            "dual_clip": algorithm.dual_clip,
        }
        # What is not set is the loss's own default: sensible limits differ a lot between losses.
        self._options = {
            key: value for key in POLICY_LOSS_OPTIONS[name] if (value := given[key]) is not None
        }
        self._forward_s = 0.0

    def train(
        self, experience: Experience, step: int, kl_coef: float, value_only: bool = False
    ) -> list[Metric]:
        """All epochs and minibatches; metrics named as in the canonical set.

        The order of samples is a pure function of (seed, step, epoch), so nothing about it has to
        be kept in a checkpoint. A minibatch without a trained token (all answers masked) is left
        out and counted. Raises Fatal as `optimiser_step` does.
        """
        began, self._forward_s = time.perf_counter(), 0.0
        metrics: list[Metric] = []
        before, empty = self.optimizers.skipped, 0
        for part in self._parts(experience, step):
            if part.tokens == 0:
                empty += 1
                continue
            metrics += self._minibatch(experience, part, kl_coef, value_only)
        metrics.append(total("policy/skipped_updates", self.optimizers.skipped - before))
        metrics.append(total("policy/empty_minibatches", empty))
        spent = time.perf_counter() - began
        metrics.append(last("time/forward", self._forward_s))
        metrics.append(last("time/backward", spent - self._forward_s))
        return list(merge(metrics).values())

    def _parts(self, experience: Experience, step: int) -> Iterator[Part]:
        learner, mode = self.settings.learner, self.settings.algorithm.aggregate
        per_row = experience.loss_mask.sum(dim=1).cpu().numpy()
        for epoch in range(learner.epochs):
            order = np.random.default_rng([self.settings.seed, step, epoch])
            shuffled = order.permutation(len(experience))
            for rows in np.array_split(shuffled, learner.minibatches):
                tokens = int(per_row[rows].sum())
                answers = int((per_row[rows] > 0).sum())
                yield Part(
                    rows=np.sort(rows).tolist(),
                    tokens=tokens,
                    denominator=tokens if mode == "token-mean" else answers,
                )

    def _minibatch(
        self, experience: Experience, part: Part, kl_coef: float, value_only: bool
    ) -> list[Metric]:
        networks, optimizers = self.networks, self.optimizers
        metrics: list[Metric] = []
        if networks.shared or not value_only:
            outcome = self._optimise(
                optimizers.policy,
                [networks.policy, *([networks.value] if networks.shared else [])],
                self._policy_calls(experience, part, kl_coef, value_only),
                optimizers.policy_skips,
            )
            name = "value/grad_norm" if value_only else "policy/grad_norm"
            metrics += _outcome_metrics(outcome, name)
        if optimizers.value is not None:
            calls = self._value_calls(experience, part)
            outcome = self._optimise(
                optimizers.value, [networks.value], calls, optimizers.value_skips
            )
            metrics += _outcome_metrics(outcome, "value/grad_norm")
        return metrics

    def _optimise(
        self,
        optimizer: torch.optim.Optimizer,
        modules: list[nn.Module | None],
        calls: Iterator[LossCall],
        skips: SkipCounter,
    ) -> StepOutcome:
        params = [p for module in modules if module is not None for p in module.parameters()]
        limit = self.settings.learner.max_grad_norm
        return optimiser_step(optimizer, params, calls, limit, skips)

    def _microbatches(self, experience: Experience, part: Part) -> Iterator[Microbatch]:
        lengths = experience.batch.lengths[part.rows].tolist()
        for chosen in plan_microbatches(lengths, self.settings.learner.tokens_per_microbatch):
            rows = [part.rows[index] for index in chosen]
            yield make_microbatch(experience.batch, rows, self.networks.device)

    def _policy_calls(
        self, experience: Experience, part: Part, kl_coef: float, value_only: bool
    ) -> Iterator[LossCall]:
        for micro in self._microbatches(experience, part):

            def run(micro: Microbatch = micro) -> tuple[Tensor, list[Metric]]:
                began = time.perf_counter()
                result = self._policy_and_shared_loss(experience, part, micro, kl_coef, value_only)
                self._forward_s += time.perf_counter() - began
                return result

            yield run

    def _value_calls(self, experience: Experience, part: Part) -> Iterator[LossCall]:
        for micro in self._microbatches(experience, part):

            def run(micro: Microbatch = micro) -> tuple[Tensor, list[Metric]]:
                began = time.perf_counter()
                result = self._value_loss(experience, part, micro, micro.input_ids)
                self._forward_s += time.perf_counter() - began
                return result

            yield run

    def _policy_and_shared_loss(
        self,
        experience: Experience,
        part: Part,
        micro: Microbatch,
        kl_coef: float,
        value_only: bool,
    ) -> tuple[Tensor, list[Metric]]:
        networks, algorithm = self.networks, self.settings.algorithm
        # With a shared trunk the value's first steps train its head alone.
        with torch.set_grad_enabled(not value_only):
            out = policy_outputs(
                networks.policy,
                micro,
                self.settings.temperature,
                networks.compute_dtype,
                entropy=algorithm.entropy_coef > 0,
                entropy_gradient=algorithm.entropy_coef > 0,
            )
        loss = torch.zeros((), device=networks.device)
        metrics: list[Metric] = []
        if not value_only:
            loss, metrics = self._policy_loss(experience, part, micro, out, kl_coef)
        if networks.shared:
            value_loss, more = self._value_loss(experience, part, micro, out.hidden)
            loss, metrics = loss + value_loss, metrics + more
        return loss, metrics

    def _policy_loss(
        self,
        experience: Experience,
        part: Part,
        micro: Microbatch,
        out: PolicyOutputs,
        kl_coef: float,
    ) -> tuple[Tensor, list[Metric]]:
        algorithm = self.settings.algorithm
        mask = _cut(experience.loss_mask, micro)
        prox = _cut(experience.prox_logp, micro)
        advantages = _cut(experience.advantages, micro)
        terms = self._loss(out.logp, prox, advantages, mask, **self._options)
        # The ORIGINAL mask stays the denominator, whatever the correction drops.
        policy = self._reduce(terms.losses * _cut(experience.importance, micro), mask, part)
        loss = policy
        share = float(mask.sum()) / part.tokens
        metrics = [
            mean("policy/loss", float(policy.detach()), share),
            *_renamed(metrics_of(terms.metrics, "policy/")),
            _ratio_max(out.logp, prox, mask),
        ]
        # Where the loss has no use for it, the entropy before the update spares a pass over [N, V].
        entropy = _cut(experience.entropy, micro) if out.entropy is None else out.entropy
        spread = float(entropy.detach()[mask].sum())
        metrics.append(mean("policy/entropy", spread, float(mask.sum())))
        if out.entropy is not None:
            loss = loss - algorithm.entropy_coef * self._reduce(out.entropy, mask, part)
        if algorithm.kl.place == "loss" and experience.ref_logp is not None:
            kl = self._reduce(self._kl_term(experience, micro, out.logp), mask, part)
            loss = loss + kl_coef * kl
            metrics.append(mean("policy/kl_loss", float(kl.detach()), share))
        return loss, metrics

    def _kl_term(self, experience: Experience, micro: Microbatch, logp: Tensor) -> Tensor:
        """KL to the reference per token [b, width], for the loss.

        Its expectation is over the policy of now, but the tokens come from the behaviour policy:
        each is weighted with the detached pi / mu, cut at the same cap as the importance weights.
        """
        if experience.ref_logp is None:
            raise ValueError("a KL in the loss needs a reference model")
        algorithm, staleness = self.settings.algorithm, self.settings.staleness
        behaviour = _cut(experience.behaviour_logp, micro)
        weight = clamped_log_ratio(logp.detach(), behaviour).exp().clamp(max=staleness.cap)
        estimator = KL_ESTIMATORS[algorithm.kl.estimator]
        return weight * estimator(logp, _cut(experience.ref_logp, micro))

    def _value_loss(
        self, experience: Experience, part: Part, micro: Microbatch, hidden: Tensor
    ) -> tuple[Tensor, list[Metric]]:
        if experience.values is None or experience.returns is None:
            raise ValueError("a value loss needs values and returns")
        algorithm = self.settings.algorithm
        mask = _cut(experience.loss_mask, micro)
        values, _ = self.networks.values(micro, hidden)
        terms = clipped_value_loss(
            values,
            _cut(experience.values, micro),
            _cut(experience.returns, micro),
            mask,
            algorithm.clip_value,
        )
        # Values are a regression over tokens, whatever the policy loss is averaged over.
        loss = aggregate(terms.losses, mask, "token-mean", part.tokens)
        chosen: MetricParts = {"clipfrac": terms.metrics["clipfrac"]}
        share = float(mask.sum()) / part.tokens
        measured = [mean("value/loss", float(loss.detach()), share), *metrics_of(chosen, "value/")]
        return algorithm.value_coef * loss, measured

    def _reduce(self, losses: Tensor, mask: Tensor, part: Part) -> Tensor:
        return aggregate(losses, mask, self.settings.algorithm.aggregate, part.denominator)


def _cut(full: Tensor, micro: Microbatch) -> Tensor:
    """The microbatch's [b, width] part of a step's [B, R] tensor."""
    return full.index_select(0, micro.rows)[:, : micro.width]


def _ratio_max(logp: Tensor, prox: Tensor, mask: Tensor) -> Metric:
    ratio = clamped_log_ratio(logp.detach(), prox).exp()
    return largest("policy/ratio_max", float(ratio.where(mask, 0.0).max()))


def _renamed(metrics: list[Metric]) -> list[Metric]:
    return [Metric(_RENAMED.get(m.name, m.name), m.kind, m.total, m.weight) for m in metrics]


def _outcome_metrics(outcome: StepOutcome, norm_name: str) -> list[Metric]:
    if outcome.skipped is not None:
        return []
    return [*outcome.metrics, mean(norm_name, outcome.grad_norm, 1)]
