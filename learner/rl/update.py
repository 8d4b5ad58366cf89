"""One step's optimisation: epochs x minibatches x microbatches over a fixed experience.

What is minimised is in `objective`; this is the loop around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from cluster.contracts.metrics import Metric, mean, merge, total
from learner.compute.meter import Meter
from learner.compute.optimizer import compute_in
from learner.compute.optimizer_step import MicrobatchLoss, SkipCounter, optimiser_step
from learner.rl.experience import Experience, Proximal, StepPlan, proximal_of
from learner.rl.forward import Networks, PolicyOutputs, policy_outputs
from learner.rl.measuring_pass import PolicyPass, WaitingForward
from learner.rl.microbatch import Microbatch
from learner.rl.objective import Minibatch, Objective
from learner.rl.own_rows import minibatches, trained_tokens
from learner.rl.step_clock import StepClock
from learner.settings import LearnerSettings

_Loss = Callable[[Microbatch, WaitingForward | None, Meter], Tensor]


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
class UpdateResult:
    """What an update measured: its metrics, and the proximal policy, whoever measured that."""

    metrics: list[Metric]
    proximal: Proximal


class PolicyUpdate:
    """Trains the networks on an experience. `value_only` steps leave the policy as it is.

    clock: is told of each pass.
    """

    def __init__(
        self,
        networks: Networks,
        optimizers: Optimizers,
        settings: LearnerSettings,
        clock: StepClock | None = None,
    ) -> None:
        self.networks, self.optimizers, self.settings = networks, optimizers, settings
        self._objective = Objective(networks, settings)
        self._clock = clock or StepClock()

    def train(self, experience: Experience, plan: StepPlan) -> UpdateResult:
        """All epochs and minibatches; metrics named as in the canonical set.

        A minibatch without a trained token (all answers masked) is left
        out and counted. Raises Fatal as `optimiser_step` does, and for a forward pass that was
        not finite.
        """
        self._clock.enters("forward")
        metrics: list[Metric] = []
        ranks = self.networks.mesh.data
        before, empty = self.optimizers.skipped, 0
        measured = experience.proximal if isinstance(experience.proximal, Proximal) else None
        first = None if measured else _empty_pass(experience)
        for part in self._minibatches(experience, plan.step):
            # A mean over no token is 0/0; the optimiser would still move by its momentum.
            if part.tokens == 0:
                empty += 1
                continue
            metrics += self._minibatch(experience, plan, part, first)
        metrics = ranks.gather_metrics(metrics)  # So far there are means and maxima only.
        metrics.append(total("policy/skipped_updates", self.optimizers.skipped - before))
        metrics.append(total("policy/empty_minibatches", empty))
        proximal = measured or self._completed(experience, first)
        return UpdateResult(metrics=list(merge(metrics).values()), proximal=proximal)

    def _completed(self, experience: Experience, first: PolicyPass | None) -> Proximal:
        """What the update's own forward pass has measured."""
        if first is None:
            raise ValueError("the update measured nothing")
        mask, behaviour = experience.mask, experience.behaviour_logp
        ranks = self.networks.mesh.data
        return proximal_of(first, experience.ref_logp, behaviour, mask, self.settings, ranks)

    def _minibatches(self, experience: Experience, step: int) -> Iterator[Minibatch]:
        algorithm = self.settings.algorithm
        per_row = trained_tokens(experience.batch, algorithm)
        for rows in minibatches(self.settings, step, len(experience)):
            tokens = int(per_row[rows].sum())
            answers = int((per_row[rows] > 0).sum())
            yield Minibatch(
                rows=rows.tolist(),
                tokens=tokens,
                denominator=tokens if algorithm.aggregate == "token-mean" else answers,
            )

    def _minibatch(
        self, experience: Experience, plan: StepPlan, part: Minibatch, first: PolicyPass | None
    ) -> list[Metric]:
        networks, optimizers = self.networks, self.optimizers
        metrics: list[Metric] = []
        if networks.shared or not plan.value_only:
            loss = partial(self._policy_and_shared_loss, experience, plan, part, first)
            metrics += self._optimise(
                optimizers.policy,
                [
                    *networks.policy_parameters(),
                    *(_parameters(networks.value) if networks.shared else []),
                ],
                self._losses(experience, part, loss),
                optimizers.policy_skips,
                "value/grad_norm" if plan.value_only else "policy/grad_norm",
            )
        if optimizers.value is not None:
            loss = partial(self._own_value_loss, experience, part)
            metrics += self._optimise(
                optimizers.value,
                _parameters(networks.value),
                self._losses(experience, part, loss),
                optimizers.value_skips,
                "value/grad_norm",
            )
        return metrics

    def _optimise(
        self,
        optimizer: torch.optim.Optimizer,
        params: list[nn.Parameter],
        losses: tuple[Meter, Iterator[MicrobatchLoss]],
        skips: SkipCounter,
        norm_name: str,
    ) -> list[Metric]:
        """One update; its metrics, none where it was skipped."""
        learner, networks, (meter, calls) = self.settings.learner, self.networks, losses
        once = learner.gradient_reduction == "step"
        # One context for all microbatches: autocast casts each weight once, not once a microbatch.
        # That keeps all weights in bfloat16; with checkpointing, memory is worth more than time.
        cached = not networks.sharded and not learner.gradient_checkpointing
        with compute_in(networks.compute_dtype, networks.device, cached=cached):
            outcome = optimiser_step(
                optimizer,
                params,
                calls,
                learner.max_grad_norm,
                skips,
                networks.mesh,
                [networks.roots.get("policy"), networks.value] if once else (),
                on_gradients=partial(self._clock.enters, "optimizer"),
            )
        self._clock.enters("forward")
        if outcome.skipped is not None:
            return []
        return [*meter.read(), mean(norm_name, outcome.grad_norm, 1)]

    def _losses(
        self, experience: Experience, part: Minibatch, loss: _Loss
    ) -> tuple[Meter, Iterator[MicrobatchLoss]]:
        """`loss` of each microbatch of a minibatch, with its waiting forward pass if there is one,
        and the meter that these calls fill."""
        meter = Meter()

        def run(micro: Microbatch, waiting: WaitingForward | None) -> tuple[Tensor, list[Metric]]:
            self._clock.enters("forward")
            # One that does not count keeps another rank company: its gradient has to be zero, and
            # nothing of it may be measured, but it has to run, for ranks wait for each other.
            result = loss(micro, waiting, meter if micro.counts else Meter())
            self._clock.enters("backward")
            return result if micro.counts else 0.0 * result, []

        micros = experience.micros.of(part.rows)
        waiting = experience.waiting or (None,) * len(micros)
        return meter, (partial(run, *pair) for pair in zip(micros, waiting, strict=True))

    def _policy_and_shared_loss(
        self,
        experience: Experience,
        plan: StepPlan,
        part: Minibatch,
        first: PolicyPass | None,
        micro: Microbatch,
        waiting: WaitingForward | None,
        meter: Meter,
    ) -> Tensor:
        networks, objective = self.networks, self._objective
        out = waiting.out if waiting else self._forward(micro, plan, everything=first is not None)
        loss = torch.zeros((), device=networks.device)
        if not plan.value_only:
            loss = objective.policy_loss(experience, plan, part, micro, out, meter)
        if first is not None:
            micro.put(first.logp, out.logp)
            if out.entropy is not None:
                micro.put(first.entropy, out.entropy)
        if networks.shared:
            value = objective.value_loss(experience, part, micro, waiting, out.hidden, meter)
            loss = loss + value
        return loss

    def _forward(self, micro: Microbatch, plan: StepPlan, everything: bool) -> PolicyOutputs:
        """everything: also what only the metrics want to know."""
        trained = self.settings.algorithm.entropy_coef > 0
        # With a shared trunk the value's first steps train its head alone.
        with torch.set_grad_enabled(not plan.value_only):
            return policy_outputs(
                self.networks.policy_root,
                micro,
                self.settings.temperature,
                self.networks.compute_dtype,
                entropy=trained or everything,
                entropy_gradient=trained,
            )

    def _own_value_loss(
        self,
        experience: Experience,
        part: Minibatch,
        micro: Microbatch,
        waiting: WaitingForward | None,
        meter: Meter,
    ) -> Tensor:
        # A network of its own reads the tokens, not the policy's hidden states.
        ids = micro.input_ids
        return self._objective.value_loss(experience, part, micro, waiting, ids, meter)


def _parameters(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters())


def _empty_pass(experience: Experience) -> PolicyPass:
    """For the update to fill in, microbatch by microbatch."""
    like = experience.behaviour_logp
    return PolicyPass(logp=torch.zeros_like(like), entropy=torch.zeros_like(like))
