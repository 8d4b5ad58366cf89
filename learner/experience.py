"""What a step trains on: everything about its samples that is fixed before the first update.

Log-probabilities under the weights of now (the proximal policy) and of the reference, values,
rewards, advantages, importance weights: all [B, R], R the longest answer, zero where there is no
token, computed without gradient in microbatches and normalised over the whole batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.contracts.config import AlgorithmConfig
from cluster.contracts.errors import Fatal
from learner.algorithms.advantages import AdvantageInputs, compute_advantages, terminal_rewards
from learner.algorithms.kl import k1
from learner.algorithms.masked import whiten
from learner.algorithms.off_policy import importance_weights
from learner.algorithms.terms import MetricParts
from learner.batching import plan_microbatches
from learner.forward import Networks, make_microbatch, policy_outputs
from learner.rollout_batch import RolloutBatch
from learner.settings import LearnerSettings

_ESTIMATOR = {
    "gae": "gae",
    "grpo": "grpo",
    "rloo": "rloo",
    "reinforce++": "reinforce_plus_plus",
    "reinforce-baseline": "reinforce_plus_plus_baseline",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Experience:
    """One step's samples as tensors, float32 on the learner's device; [B, R] unless said.

    mask: bool, real answer tokens. loss_mask: bool, those that are trained (see
    `algorithm.truncated`). behaviour_logp: the engine's. prox_logp: this learner's when the step
    began. ref_logp, values, returns: None where the algorithm has no use for them.
    age: int64, learner steps between sampling and now. scores: float64 [B], as scored.
    terminal: float64 [B], what was placed on the last token. importance: see `off_policy`.
    """

    batch: RolloutBatch
    mask: Tensor
    loss_mask: Tensor
    behaviour_logp: Tensor
    prox_logp: Tensor
    entropy: Tensor
    ref_logp: Tensor | None
    kl: Tensor | None
    values: Tensor | None
    rewards: Tensor
    advantages: Tensor
    returns: Tensor | None
    age: Tensor
    scores: Tensor
    terminal: Tensor
    importance: Tensor
    importance_parts: MetricParts

    def __len__(self) -> int:
        return len(self.batch)


@dataclass(slots=True, eq=False)
class _Passes:
    """What the forward passes without gradient gave."""

    prox_logp: Tensor
    entropy: Tensor
    ref_logp: Tensor | None
    values: Tensor | None
    after: Tensor | None


def build_experience(
    batch: RolloutBatch,
    networks: Networks,
    settings: LearnerSettings,
    version: int,
    kl_coef: float,
) -> Experience:
    """The experience of `batch` for a learner at policy `version`.

    Raises Fatal for a token older than the staleness bound (the controller's invariant, checked
    where it matters) or from the future, and for a forward pass that is not finite.
    """
    algorithm = settings.algorithm
    width = int(batch.response_ids.lengths.max())
    device = networks.device
    age = token_ages(batch, version, settings.staleness.bound, width).to(device)
    mask = (
        torch.arange(width)[None, :] < torch.from_numpy(batch.response_ids.lengths)[:, None]
    ).to(device)
    behaviour = torch.from_numpy(batch.behaviour_logp.padded(width)).to(device)
    passes = _forward_passes(batch, networks, settings, width)
    _require_finite(passes)
    truncated = torch.from_numpy(batch.truncated).to(device)
    scores = torch.from_numpy(batch.scores.astype(np.float64)).to(device)
    terminal = terminal_scores(scores, truncated, algorithm)
    kl = None
    if passes.ref_logp is not None:
        kl = k1(passes.prox_logp, passes.ref_logp).where(mask, 0.0)
    rewards = token_rewards(terminal, kl, mask, algorithm, kl_coef)
    bootstrap = None
    if algorithm.truncated == "bootstrap" and passes.after is not None:
        bootstrap = passes.after.where(truncated, 0.0)
    inputs = AdvantageInputs(
        rewards=rewards,
        mask=mask,
        group_ids=torch.from_numpy(batch.group_ids).to(device),
        values=passes.values,
        bootstrap=bootstrap,
        gamma=algorithm.gamma,
        lam=algorithm.lam,
    )
    # True follows the estimator: GAE and REINFORCE++ whiten, GRPO and RLOO compare within a group.
    whitened = None if algorithm.whiten_advantages else False
    result = compute_advantages(estimator_name(algorithm), inputs, whitened)
    weights, parts = importance_weights(
        passes.prox_logp,
        behaviour,
        mask,
        settings.staleness.correction,
        settings.staleness.cap,
    )
    kept = mask & ~truncated[:, None] if algorithm.truncated == "mask" else mask
    return Experience(
        batch=batch,
        mask=mask,
        loss_mask=kept,
        behaviour_logp=behaviour,
        prox_logp=passes.prox_logp,
        entropy=passes.entropy,
        ref_logp=passes.ref_logp,
        kl=kl,
        values=passes.values,
        rewards=rewards,
        advantages=result.advantages,
        returns=result.returns,
        age=age,
        scores=scores,
        terminal=terminal,
        importance=weights,
        importance_parts=parts,
    )


def token_ages(batch: RolloutBatch, version: int, bound: int, width: int) -> Tensor:
    """int64 [B, width]: learner steps between sampling each token and now, 0 at padding."""
    ages = version - batch.versions.values
    if len(ages) and (ages.max() > bound or ages.min() < 0):
        worst = int(ages.max()) if ages.max() > bound else int(ages.min())
        at = int(np.flatnonzero(ages == worst)[0])
        row = int(np.searchsorted(batch.versions.offsets, at, side="right")) - 1
        problem = f"older than the bound {bound}" if worst > bound else "from a future version"
        raise Fatal(
            f"group {int(batch.group_ids[row])} holds a token of version {version - worst} while "
            f"the learner trains version {version}: {problem}"
        )
    return torch.from_numpy(type(batch.versions)(ages, batch.versions.offsets).padded(width))


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
    terminal: Tensor, kl: Tensor | None, mask: Tensor, algorithm: AlgorithmConfig, kl_coef: float
) -> Tensor:
    """float32 [B, R]: -kl_coef * k1 on each token (if the KL belongs in the reward), plus the
    terminal score on the last one; scaled to unit variance over the batch if asked for."""
    penalty = torch.zeros_like(mask, dtype=torch.float32)
    if kl is not None and algorithm.kl.place == "reward":
        penalty = kl
    rewards = terminal_rewards(terminal.float(), penalty, mask, kl_coef)
    return whiten(rewards, mask, shift_mean=False) if algorithm.whiten_rewards else rewards


def estimator_name(algorithm: AlgorithmConfig) -> str:
    """The configured estimator's name in `advantages.ESTIMATORS`."""
    if algorithm.advantage == "grpo" and not algorithm.scale_by_std:
        return "dr_grpo"
    return _ESTIMATOR[algorithm.advantage]


@torch.no_grad()
def _forward_passes(
    batch: RolloutBatch, networks: Networks, settings: LearnerSettings, width: int
) -> _Passes:
    rows, device = len(batch), networks.device

    def zeros(wanted: bool = True) -> Tensor | None:
        return torch.zeros(rows, width, device=device) if wanted else None

    prox, entropy = torch.zeros(rows, width, device=device), torch.zeros(rows, width, device=device)
    ref, values = zeros(networks.reference is not None), zeros(networks.has_values)
    after = torch.zeros(rows, device=device) if networks.has_values else None
    budget = settings.learner.tokens_per_microbatch
    for chosen in plan_microbatches(batch.lengths.tolist(), budget):
        micro = make_microbatch(batch, chosen, device)
        seen, at = micro.rows, slice(0, micro.width)
        out = policy_outputs(
            networks.policy, micro, settings.temperature, networks.compute_dtype, entropy=True
        )
        prox[seen, at] = out.logp
        if out.entropy is not None:
            entropy[seen, at] = out.entropy
        if ref is not None and networks.reference is not None:
            ref[seen, at] = policy_outputs(
                networks.reference, micro, settings.temperature, networks.compute_dtype
            ).logp
        if values is not None and after is not None:
            values[seen, at], after[seen] = networks.values(micro, out.hidden)
    return _Passes(prox, entropy, ref, values, after)


def _require_finite(passes: _Passes) -> None:
    named = {
        "policy log-probabilities": passes.prox_logp,
        "reference log-probabilities": passes.ref_logp,
        "values": passes.values,
    }
    for name, tensor in named.items():
        if tensor is not None and not math.isfinite(float(tensor.sum())):
            raise Fatal(f"the {name} of this step are not finite")
