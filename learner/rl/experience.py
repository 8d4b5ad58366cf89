"""What a step trains on: everything about its samples that is fixed before the first update.

Log-probabilities under the weights of now (the proximal policy) and of the reference, values,
rewards, advantages, importance weights: all [B, R], B this process's rows of the step (`own_rows`),
R the longest answer among them, zero where there is no token. They are computed in microbatches and
normalised over the whole step, of which processes tell each other sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.contracts.config.algorithm import AlgorithmConfig
from cluster.contracts.errors import Fatal
from learner.algorithms.advantages import (
    AdvantageInputs,
    compute_advantages,
    terminal_rewards,
)
from learner.algorithms.importance import importance_weights
from learner.algorithms.kl import k1
from learner.algorithms.loss_terms import MetricParts
from learner.algorithms.masked import moment_sums, moments_from_sums, whiten
from learner.compute.ranks import SINGLE, Ranks
from learner.rl.ahead import PartsAhead, parts_of_rows, passes_of
from learner.rl.chosen import chosen_estimator, whitened
from learner.rl.forward import Networks
from learner.rl.measuring_pass import (
    MeasuredPasses,
    PolicyPass,
    WaitingForward,
    measured,
    plan_passes,
)
from learner.rl.microbatch import Microbatches
from learner.rl.own_rows import deal_rows
from learner.rl.rollouts import Ragged, RolloutBatch
from learner.settings import LearnerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What a learner step is told apart from its samples.

    step: the policy's version before it. kl_coef: the KL coefficient in force during the step.
    value_only: the update leaves the policy as it is.
    """

    step: int
    kl_coef: float
    value_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Proximal:
    """What the proximal policy, the weights when the step began, gives for the step's tokens, and
    what follows from it; float32 [B, R], zero where there is no token.

    kl: k1 to the reference, None without one. importance, importance_parts: see
    `importance_weights`.
    """

    logp: Tensor
    entropy: Tensor
    kl: Tensor | None
    importance: Tensor
    importance_parts: MetricParts


@dataclass(frozen=True, slots=True)
class MeasuredByUpdate:
    """Says that the update's own forward pass is the first of the step, so that its
    log-probabilities are the proximal ones: the update measures them and returns them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Experience:
    """This process's samples of a step as tensors, float32 on its device; [B, R] unless said.

    batch: all samples of the step, which are as many as `len` says.
    mask: bool, real answer tokens. loss_mask: bool, those that are trained (see
    `algorithm.truncated`). behaviour_logp: the engine's. ref_logp, values, returns: None where the
    algorithm has no use for them. age: int64, learner steps between sampling and now.
    scores: float64 [B], as scored. terminal: float64 [B], what was placed on the last token.
    proximal: measured, or to be measured by the update. waiting: forward passes that wait for
    their loss, in the order of `micros.of` all rows, None for one
    that does not, or for all. ranks: those that share the step.
    """

    batch: RolloutBatch
    micros: Microbatches
    mask: Tensor
    loss_mask: Tensor
    behaviour_logp: Tensor
    ref_logp: Tensor | None
    values: Tensor | None
    rewards: Tensor
    advantages: Tensor
    returns: Tensor | None
    age: Tensor
    scores: Tensor
    terminal: Tensor
    proximal: Proximal | MeasuredByUpdate
    waiting: tuple[WaitingForward | None, ...] | None
    ranks: Ranks = SINGLE

    def __len__(self) -> int:
        return len(self.batch)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Tokens:
    """What rollouts say of their tokens, as tensors; see `Experience`. truncated: bool [B]."""

    mask: Tensor
    behaviour_logp: Tensor
    truncated: Tensor
    group_ids: Tensor

    @classmethod
    def of(cls, batch: RolloutBatch, width: int, device: torch.device) -> _Tokens:
        lengths = torch.from_numpy(batch.response_ids.lengths)[:, None]
        return cls(
            mask=(torch.arange(width)[None, :] < lengths).to(device),
            behaviour_logp=torch.from_numpy(batch.behaviour_logp.padded(width)).to(device),
            truncated=torch.from_numpy(batch.truncated).to(device),
            group_ids=torch.from_numpy(batch.group_ids).to(device),
        )


def build_experience(
    batch: RolloutBatch,
    networks: Networks,
    settings: LearnerSettings,
    plan: StepPlan,
    ahead: PartsAhead | None = None,
) -> Experience:
    """The experience of `batch` for a learner at policy version `plan.step`. ahead: what was
    measured of it already; None: nothing.

    Raises Fatal for a token older than the staleness bound (the controller's invariant, checked
    where it matters) or from the future, and for a forward pass that is not finite.
    """
    algorithm, device = settings.algorithm, networks.device
    mesh, ranks = networks.mesh, networks.mesh.data
    require_ages(batch, plan.step, settings.staleness.bound)
    share = deal_rows(batch, settings, plan.step, ranks)
    own = share.batch
    width = int(own.response_ids.lengths.max())
    age = token_ages(own, plan.step, width).to(device)
    tokens = _Tokens.of(own, width, device)
    micros = Microbatches(
        share,
        settings.learner.tokens_per_microbatch,
        device,
        packed=networks.packed,
        sequence=mesh.sequence,
        part_of_row=parts_of_rows(batch, settings),
    )
    pass_plan = plan_passes(settings, networks, plan.value_only)
    if not batch_trains(batch, algorithm):
        pass_plan = "separate"  # There will be no update to measure in.
    done = passes_of(pass_plan, micros.parts(), ahead or PartsAhead(), networks, settings)
    every = micros.of(range(len(batch)))
    passes = measured(pass_plan, len(own), width, every, done, networks)
    _require_finite(
        {"reference log-probabilities": passes.ref_logp, "values": passes.values}, ranks
    )
    proximal: Proximal | MeasuredByUpdate = MeasuredByUpdate()
    if passes.policy is not None:
        proximal = proximal_of(
            passes.policy, passes.ref_logp, tokens.behaviour_logp, tokens.mask, settings, ranks
        )
    # Float64, as scored: metrics report what the reward service said.
    scores = torch.from_numpy(own.scores.astype(np.float64)).to(device)
    terminal = terminal_scores(scores, tokens.truncated, algorithm)
    inputs = _advantage_inputs(terminal, proximal, tokens, passes, algorithm, plan, ranks)
    result = compute_advantages(
        chosen_estimator(algorithm), inputs, whitened(algorithm), ranks.summed
    )
    mask = tokens.mask
    # Masked answers still count in the advantages of their group: only the loss leaves them out.
    kept = mask & ~tokens.truncated[:, None] if algorithm.truncated == "mask" else mask
    return Experience(
        batch=batch,
        micros=micros,
        mask=mask,
        loss_mask=kept,
        behaviour_logp=tokens.behaviour_logp,
        ref_logp=passes.ref_logp,
        values=passes.values,
        rewards=inputs.rewards,
        advantages=result.advantages,
        returns=result.returns,
        age=age,
        scores=scores,
        terminal=terminal,
        proximal=proximal,
        waiting=passes.waiting,
        ranks=ranks,
    )


def proximal_of(
    policy: PolicyPass,
    ref_logp: Tensor | None,
    behaviour_logp: Tensor,
    mask: Tensor,
    settings: LearnerSettings,
    ranks: Ranks = SINGLE,
) -> Proximal:
    """What follows from a pass of the proximal policy. Raises Fatal, on each of `ranks`, for one
    that is not finite on any."""
    # Here and not at the optimiser: an infinite one would hide in a clamped ratio.
    _require_finite({"policy log-probabilities": policy.logp}, ranks)
    kl = None if ref_logp is None else k1(policy.logp, ref_logp).where(mask, 0.0)
    staleness = settings.staleness
    weights, parts = importance_weights(
        policy.logp,
        behaviour_logp,
        mask,
        staleness.correction,
        staleness.cap,
        staleness.floor,
        staleness.veto,
    )
    return Proximal(
        logp=policy.logp,
        entropy=policy.entropy,
        kl=kl,
        importance=weights,
        importance_parts=parts,
    )


def _advantage_inputs(
    terminal: Tensor,
    proximal: Proximal | MeasuredByUpdate,
    tokens: _Tokens,
    passes: MeasuredPasses,
    algorithm: AlgorithmConfig,
    plan: StepPlan,
    ranks: Ranks,
) -> AdvantageInputs:
    # With the KL in the reward the passes are never "inline", so it is measured by now.
    kl = proximal.kl if isinstance(proximal, Proximal) else None
    in_reward = kl if algorithm.kl.place == "reward" else None
    return AdvantageInputs(
        rewards=token_rewards(terminal, in_reward, tokens.mask, algorithm, plan.kl_coef, ranks),
        mask=tokens.mask,
        group_ids=tokens.group_ids,
        scores=terminal.float(),
        penalties=None if in_reward is None else -plan.kl_coef * in_reward,
        values=passes.values,
        bootstrap=_bootstrap(passes, tokens, algorithm),
        gamma=algorithm.gamma,
        lam=algorithm.lam,
    )


def _bootstrap(
    passes: MeasuredPasses, tokens: _Tokens, algorithm: AlgorithmConfig
) -> Tensor | None:
    if algorithm.truncated != "bootstrap" or passes.after is None:
        return None
    return passes.after.where(tokens.truncated, 0.0)


def batch_trains(batch: RolloutBatch, algorithm: AlgorithmConfig) -> bool:
    """Whether any token of `batch` is left to train on."""
    return algorithm.truncated != "mask" or not bool(batch.truncated.all())


def require_ages(batch: RolloutBatch, version: int, bound: int) -> None:
    """Raise Fatal for a token that is older than the bound, or from the future."""
    # Counted by token: a completion may have begun under older weights than it ended with.
    ages = version - batch.versions.values
    if len(ages) and (ages.max() > bound or ages.min() < 0):
        worst = int(ages.max()) if ages.max() > bound else int(ages.min())
        at = int(np.flatnonzero(ages == worst)[0])
        # Which row holds it, so that the message names a group that can be looked for.
        row = int(np.searchsorted(batch.versions.offsets, at, side="right")) - 1
        problem = f"older than the bound {bound}" if worst > bound else "from a future version"
        raise Fatal(
            f"group {int(batch.group_ids[row])} holds a token of version {version - worst} while "
            f"the learner trains version {version}: {problem}"
        )


def token_ages(batch: RolloutBatch, version: int, width: int) -> Tensor:
    """int64 [B, width]: learner steps between sampling each token and now, 0 at padding."""
    ages = Ragged(version - batch.versions.values, batch.versions.offsets)
    return torch.from_numpy(ages.padded(width))


def terminal_scores(scores: Tensor, truncated: Tensor, algorithm: AlgorithmConfig) -> Tensor:
    """[B] what goes on the last token of each answer.

    An answer that did not end pays the missing-EOS penalty. With `truncated = "bootstrap"` its
    score is left away: it judges an end that was not reached, and the value estimate of the state
    after the last token stands for it; both together would count the future twice.
    """
    placed = scores
    if algorithm.truncated == "bootstrap":
        placed = placed.where(~truncated, 0.0)
    return placed - algorithm.missing_eos_penalty * truncated.to(placed.dtype)


def token_rewards(
    terminal: Tensor,
    kl: Tensor | None,
    mask: Tensor,
    algorithm: AlgorithmConfig,
    kl_coef: float,
    ranks: Ranks = SINGLE,
) -> Tensor:
    """float32 [B, R]: -kl_coef * k1 on each token (kl: None where the KL is not in the reward),
    plus the terminal score on the last one; scaled to unit variance over the rows of all `ranks`
    if asked for."""
    # Zeros instead of a branch: rewards are then the same sum whether a reference is there.
    penalty = torch.zeros_like(mask, dtype=torch.float32) if kl is None else kl
    rewards = terminal_rewards(terminal.float(), penalty, mask, kl_coef)
    if not algorithm.whiten_rewards:
        return rewards
    moments = moments_from_sums(ranks.summed(moment_sums(rewards, mask)))
    return whiten(rewards, mask, shift_mean=False, moments=moments)


def _require_finite(named: Mapping[str, Tensor | None], ranks: Ranks) -> None:
    # One sum instead of a look at every number: it is finite only if all of them are (and an
    # overflow of the sum would need log-probabilities far outside any model's). Of all ranks: one
    # that raised alone would leave the others waiting for it.
    sums = {name: tensor.sum() for name, tensor in named.items() if tensor is not None}
    if not sums:
        return
    for name, total in zip(sums, ranks.summed(torch.stack(list(sums.values()))), strict=True):
        if not math.isfinite(float(total)):
            raise Fatal(f"the {name} of this step are not finite")
