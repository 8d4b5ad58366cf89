"""What an update minimises: the losses of one microbatch of a fixed experience.

Every loss is divided by the token or answer count of its whole MINIBATCH, so the result does not
depend on how the minibatch was cut into microbatches.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from learner.algorithms.importance import importance_weights
from learner.algorithms.kl import KL_ESTIMATORS, clamped_log_ratio
from learner.algorithms.masked import aggregate
from learner.algorithms.value_loss import clipped_value_loss
from learner.compute.meter import Meter
from learner.rl.chosen import chosen_loss
from learner.rl.experience import Experience, Proximal, StepPlan
from learner.rl.forward import Networks, PolicyOutputs
from learner.rl.measuring_pass import WaitingForward
from learner.rl.microbatch import Microbatch
from learner.settings import LearnerSettings

_RENAMED = {"ratio": "ratio_mean"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Minibatch:
    """The samples of one optimiser step: their rows, their trained tokens, and what the policy's
    losses are divided by (tokens or answers, of the WHOLE minibatch)."""

    rows: list[int]
    tokens: int
    denominator: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _ProximalPart:
    """A microbatch's [b, width] part of what the proximal policy gave. entropy: before the
    update, None where the forward pass of now gives it."""

    logp: Tensor
    importance: Tensor
    entropy: Tensor | None


class Objective:
    """The losses as `algorithm` sets them. What is measured beside them goes to the given meter."""

    def __init__(self, networks: Networks, settings: LearnerSettings) -> None:
        self._networks, self._settings = networks, settings
        self._loss = chosen_loss(settings.algorithm)

    def policy_loss(
        self,
        experience: Experience,
        plan: StepPlan,
        part: Minibatch,
        micro: Microbatch,
        out: PolicyOutputs,
        meter: Meter,
    ) -> Tensor:
        """0-d: policy loss, entropy bonus and KL term of one microbatch.

        out: the policy's forward pass of now, with gradient.
        """
        algorithm = self._settings.algorithm
        mask = micro.cut(experience.loss_mask)
        prox = self._proximal(experience, micro, out)
        advantages = micro.cut(experience.advantages)
        # Per token and not reduced: the weights of older samples have to be multiplied in first.
        terms = self._loss(out.logp, prox.logp, advantages, mask)
        # The ORIGINAL mask stays the denominator, whatever the correction drops: dividing by the
        # tokens that are left would give them more weight the more others are dropped.
        policy = self._reduce(terms.losses * prox.importance, mask, part)
        loss = policy
        count = mask.sum()
        # `policy` is a part of the minibatch's mean already; its weight among the microbatches is
        # its share of the tokens.
        share = count.double() / part.tokens
        meter.mean("policy/loss", policy, share)
        named = {_RENAMED.get(name, name): found for name, found in terms.metrics.items()}
        meter.parts(named, "policy/")
        ratio = clamped_log_ratio(out.logp.detach(), prox.logp).exp()
        meter.largest("policy/ratio_max", ratio.where(mask, 0.0).max())
        # Where the loss has no use for it, the entropy before the update spares a pass over [N, V].
        entropy = prox.entropy if out.entropy is None else out.entropy
        if entropy is not None:
            meter.mean("policy/entropy", entropy.detach().where(mask, 0.0).sum(), count)
        if algorithm.entropy_coef > 0 and out.entropy is not None:
            loss = loss - algorithm.entropy_coef * self._reduce(out.entropy, mask, part)
        if algorithm.kl.place == "loss" and experience.ref_logp is not None:
            kl = self._reduce(self._kl_term(experience, micro, out.logp), mask, part)
            loss = loss + plan.kl_coef * kl
            meter.mean("policy/kl_loss", kl, share)
        return loss

    def value_loss(
        self,
        experience: Experience,
        part: Minibatch,
        micro: Microbatch,
        waiting: WaitingForward | None,
        hidden: Tensor,
        meter: Meter,
    ) -> Tensor:
        """0-d, times `value_coef`. hidden: the policy's, which a shared head reads; a network of
        its own reads the microbatch's tokens."""
        networks, algorithm = self._networks, self._settings.algorithm
        values = networks.values(micro, hidden)[0] if waiting is None else waiting.values
        if values is None or experience.values is None or experience.returns is None:
            raise ValueError("a value loss needs values and returns")
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
        meter.mean("value/loss", loss, mask.sum().double() / part.tokens)
        meter.parts({"clipfrac": terms.metrics["clipfrac"]}, "value/")
        return algorithm.value_coef * loss

    def _proximal(
        self, experience: Experience, micro: Microbatch, out: PolicyOutputs
    ) -> _ProximalPart:
        proximal = experience.proximal
        if isinstance(proximal, Proximal):
            return _ProximalPart(
                logp=micro.cut(proximal.logp),
                importance=micro.cut(proximal.importance),
                entropy=micro.cut(proximal.entropy),
            )
        staleness = self._settings.staleness
        prox = out.logp.detach()
        # Weights belong to a token or to an answer, so those of a microbatch are those of the step.
        weights, _ = importance_weights(
            prox,
            micro.cut(experience.behaviour_logp),
            micro.cut(experience.mask),
            staleness.correction,
            staleness.cap,
            staleness.floor,
            staleness.veto,
        )
        return _ProximalPart(logp=prox, importance=weights, entropy=out.entropy)

    def _kl_term(self, experience: Experience, micro: Microbatch, logp: Tensor) -> Tensor:
        """KL to the reference per token [b, width], for the loss.

        Its expectation is over the policy of now, but the tokens come from the behaviour policy:
        each is weighted with the detached pi / mu, cut at the same cap as the importance weights.
        """
        if experience.ref_logp is None:
            raise ValueError("a KL in the loss needs a reference model")
        algorithm, staleness = self._settings.algorithm, self._settings.staleness
        behaviour = micro.cut(experience.behaviour_logp)
        weight = clamped_log_ratio(logp.detach(), behaviour).exp().clamp(max=staleness.cap)
        estimator = KL_ESTIMATORS[algorithm.kl.estimator]
        return weight * estimator(logp, micro.cut(experience.ref_logp))

    def _reduce(self, losses: Tensor, mask: Tensor, part: Minibatch) -> Tensor:
        settings = self._settings
        mode = settings.algorithm.aggregate
        return aggregate(losses, mask, mode, part.denominator, max_length=settings.max_tokens)
