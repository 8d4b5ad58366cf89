"""One step's optimisation: epochs x minibatches x microbatches over a fixed experience.

Every loss is divided by the token or answer count of its whole MINIBATCH, so the result does not
depend on how the minibatch was cut into microbatches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from cluster.contracts.metrics import Metric, last, mean, merge, total
from learner.algorithms.importance import importance_weights
from learner.algorithms.kl import KL_ESTIMATORS, clamped_log_ratio
from learner.algorithms.masked import aggregate
from learner.algorithms.policy_loss import POLICY_LOSS_OPTIONS, POLICY_LOSSES
from learner.algorithms.value_loss import clipped_value_loss
from learner.compute.meter import Meter
from learner.compute.optimizer import compute_in
from learner.compute.optimizer_step import Microbatch as LossCall
from learner.compute.optimizer_step import SkipCounter, optimiser_step
from learner.rl.experience import Experience
from learner.rl.forward import Microbatch, Networks, PolicyOutputs, policy_outputs
from learner.rl.measuring_pass import Kept
from learner.settings import LearnerSettings

_LOSS = {"ppo": "ppo_clip", "reinforce": "reinforce", "cispo": "cispo", "gspo": "gspo"}
_Result = tuple[Tensor, list[Metric]]
_Loss = Callable[[Microbatch, Kept | None], Tensor]
_RENAMED = {"ratio": "ratio_mean"}


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
        self._meter = Meter()

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
        ranks = self.networks.ranks
        before, empty = self.optimizers.skipped, 0
        for part in self._parts(experience, step):
            if part.tokens == 0:
                empty += 1
                continue
            metrics += self._minibatch(experience, part, kl_coef, value_only)
        metrics = ranks.gather_metrics(metrics)  # So far there are means and maxima only.
        if experience.inline:
            ranks.sum_([experience.prox_logp, experience.entropy])
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
            loss = partial(self._policy_and_shared_loss, experience, part, kl_coef, value_only)
            metrics += self._optimise(
                optimizers.policy,
                [networks.policy, *([networks.value] if networks.shared else [])],
                self._calls(experience, part, loss),
                optimizers.policy_skips,
                "value/grad_norm" if value_only else "policy/grad_norm",
            )
        if optimizers.value is not None:
            metrics += self._optimise(
                optimizers.value,
                [networks.value],
                self._calls(experience, part, partial(self._own_value_loss, experience, part)),
                optimizers.value_skips,
                "value/grad_norm",
            )
        return metrics

    def _optimise(
        self,
        optimizer: torch.optim.Optimizer,
        modules: list[nn.Module | None],
        calls: Iterator[LossCall],
        skips: SkipCounter,
        norm_name: str,
    ) -> list[Metric]:
        """One update; its metrics, none where it was skipped."""
        params = [p for module in modules if module is not None for p in module.parameters()]
        limit = self.settings.learner.max_grad_norm
        self._meter = Meter()
        # One context for all microbatches: autocast casts each weight once, not once a microbatch.
        networks = self.networks
        with compute_in(networks.compute_dtype, networks.device, cached=not networks.sharded):
            outcome = optimiser_step(optimizer, params, calls, limit, skips, networks.ranks)
        if outcome.skipped is not None:
            return []
        return [*self._meter.read(), mean(norm_name, outcome.grad_norm, 1)]

    def _calls(self, experience: Experience, part: Part, loss: _Loss) -> Iterator[LossCall]:
        """`loss` of each microbatch of a minibatch, with its waiting forward pass if there is."""
        micros = experience.micros.of(part.rows)
        for index, micro in enumerate(micros):
            kept = None if experience.kept is None else experience.kept[index]

            def run(micro: Microbatch = micro, kept: Kept | None = kept) -> _Result:
                began, meter = time.perf_counter(), self._meter
                if not micro.counts:
                    self._meter = Meter()
                result = loss(micro, kept)
                if not micro.counts:
                    self._meter, result = meter, 0.0 * result
                self._forward_s += time.perf_counter() - began
                return result, []

            yield run

    def _policy_and_shared_loss(
        self,
        experience: Experience,
        part: Part,
        kl_coef: float,
        value_only: bool,
        micro: Microbatch,
        kept: Kept | None,
    ) -> Tensor:
        networks = self.networks
        out = self._forward(experience, micro, value_only) if kept is None else kept.out
        loss = torch.zeros((), device=networks.device)
        if not value_only:
            loss = self._policy_loss(experience, part, micro, out, kl_coef)
        if networks.shared:
            values = networks.values(micro, out.hidden)[0] if kept is None else kept.values
            loss = loss + self._value_loss(experience, part, micro, values)
        return loss

    def _forward(
        self, experience: Experience, micro: Microbatch, value_only: bool
    ) -> PolicyOutputs:
        trained = self.settings.algorithm.entropy_coef > 0
        # With a shared trunk the value's first steps train its head alone.
        with torch.set_grad_enabled(not value_only):
            return policy_outputs(
                self.networks.policy_root,
                micro,
                self.settings.temperature,
                self.networks.compute_dtype,
                entropy=trained or experience.inline,
                entropy_gradient=trained,
            )

    def _policy_loss(
        self,
        experience: Experience,
        part: Part,
        micro: Microbatch,
        out: PolicyOutputs,
        kl_coef: float,
    ) -> Tensor:
        algorithm, meter = self.settings.algorithm, self._meter
        mask = micro.cut(experience.loss_mask)
        if experience.inline:
            micro.put(experience.prox_logp, out.logp)
            if out.entropy is not None:
                micro.put(experience.entropy, out.entropy)
        prox = micro.cut(experience.prox_logp)
        advantages = micro.cut(experience.advantages)
        terms = self._loss(out.logp, prox, advantages, mask, **self._options)
        # The ORIGINAL mask stays the denominator, whatever the correction drops.
        weights = self._importance(experience, micro, prox)
        policy = self._reduce(terms.losses * weights, mask, part)
        loss = policy
        count = mask.sum()
        share = count.double() / part.tokens
        meter.mean("policy/loss", policy, share)
        named = {_RENAMED.get(name, name): found for name, found in terms.metrics.items()}
        meter.parts(named, "policy/")
        ratio = clamped_log_ratio(out.logp.detach(), prox).exp()
        meter.largest("policy/ratio_max", ratio.where(mask, 0.0).max())
        # Where the loss has no use for it, the entropy before the update spares a pass over [N, V].
        entropy = micro.cut(experience.entropy) if out.entropy is None else out.entropy
        meter.mean("policy/entropy", entropy.detach().where(mask, 0.0).sum(), count)
        if algorithm.entropy_coef > 0 and out.entropy is not None:
            loss = loss - algorithm.entropy_coef * self._reduce(out.entropy, mask, part)
        if algorithm.kl.place == "loss" and experience.ref_logp is not None:
            kl = self._reduce(self._kl_term(experience, micro, out.logp), mask, part)
            loss = loss + kl_coef * kl
            meter.mean("policy/kl_loss", kl, share)
        return loss

    def _importance(self, experience: Experience, micro: Microbatch, prox: Tensor) -> Tensor:
        if not experience.inline:
            return micro.cut(experience.importance)
        staleness = self.settings.staleness
        # Weights belong to a token or to an answer, so those of a microbatch are those of the step.
        weights, _ = importance_weights(
            prox,
            micro.cut(experience.behaviour_logp),
            micro.cut(experience.mask),
            staleness.correction,
            staleness.cap,
        )
        return weights

    def _kl_term(self, experience: Experience, micro: Microbatch, logp: Tensor) -> Tensor:
        """KL to the reference per token [b, width], for the loss.

        Its expectation is over the policy of now, but the tokens come from the behaviour policy:
        each is weighted with the detached pi / mu, cut at the same cap as the importance weights.
        """
        if experience.ref_logp is None:
            raise ValueError("a KL in the loss needs a reference model")
        algorithm, staleness = self.settings.algorithm, self.settings.staleness
        behaviour = micro.cut(experience.behaviour_logp)
        weight = clamped_log_ratio(logp.detach(), behaviour).exp().clamp(max=staleness.cap)
        estimator = KL_ESTIMATORS[algorithm.kl.estimator]
        return weight * estimator(logp, micro.cut(experience.ref_logp))

    def _own_value_loss(
        self, experience: Experience, part: Part, micro: Microbatch, kept: Kept | None
    ) -> Tensor:
        # A network of its own reads the tokens, not the policy's hidden states.
        ids = micro.input_ids
        values = self.networks.values(micro, ids)[0] if kept is None else kept.values
        return self._value_loss(experience, part, micro, values)

    def _value_loss(
        self, experience: Experience, part: Part, micro: Microbatch, values: Tensor | None
    ) -> Tensor:
        if values is None or experience.values is None or experience.returns is None:
            raise ValueError("a value loss needs values and returns")
        algorithm = self.settings.algorithm
        mask = micro.cut(experience.loss_mask)
        terms = clipped_value_loss(
            values,
            micro.cut(experience.values),
            micro.cut(experience.returns),
            mask,
            algorithm.clip_value,
        )
        # Values are a regression over tokens, whatever the policy loss is averaged over.
        loss = aggregate(terms.losses, mask, "token-mean", part.tokens)
        self._meter.mean("value/loss", loss, mask.sum().double() / part.tokens)
        self._meter.parts({"clipfrac": terms.metrics["clipfrac"]}, "value/")
        return algorithm.value_coef * loss

    def _reduce(self, losses: Tensor, mask: Tensor, part: Part) -> Tensor:
        return aggregate(losses, mask, self.settings.algorithm.aggregate, part.denominator)
