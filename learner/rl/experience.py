"""What a step trains on: everything about its samples that is fixed before the first update.

Log-probabilities under the weights of now (the proximal policy) and of the reference, values,
rewards, advantages, importance weights: all [B, R], R the longest answer, zero where there is no
token, computed in microbatches and normalised over the whole batch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.contracts.config.train import AlgorithmConfig
from cluster.contracts.errors import Fatal
from learner.algorithms.advantages import AdvantageInputs, compute_advantages, terminal_rewards
from learner.algorithms.importance import importance_weights
from learner.algorithms.kl import k1
from learner.algorithms.loss_terms import MetricParts
from learner.algorithms.masked import whiten
from learner.rl.forward import Microbatches, Networks
from learner.rl.measuring_pass import Kept, choose_way, run_passes
from learner.rl.rollouts import RolloutBatch
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
    inline: prox_logp and entropy are 0 still, to be filled in by the update's forward pass;
    `completed` then gives what follows from them (kl, importance). kept: forward passes that wait
    for their loss, in the order of `micros.of` all rows, or None.
    """

    batch: RolloutBatch
    micros: Microbatches
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
    inline: bool = False
    kept: list[Kept] | None = None

    def __len__(self) -> int:
        return len(self.batch)


def build_experience(
    batch: RolloutBatch,
    networks: Networks,
    settings: LearnerSettings,
    version: int,
    kl_coef: float,
    value_only: bool = False,
) -> Experience:
    """The experience of `batch` for a learner at policy `version`.

    value_only: the update will leave the policy as it is.
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
    truncated = torch.from_numpy(batch.truncated).to(device)
    kept = mask & ~truncated[:, None] if algorithm.truncated == "mask" else mask
    way = choose_way(settings, networks, value_only)
    if not batch_trains(batch, algorithm):
        way = "separate"  # There will be no update to measure in.
    micros = Microbatches(
        batch,
        settings.learner.tokens_per_microbatch,
        device,
        packed=networks.packed,
        ranks=networks.ranks,
    )
    rows = range(len(batch))
    passes = run_passes(way, len(batch), width, micros.of(rows), networks, settings)
    _require_finite(passes.prox_logp, passes.ref_logp, passes.values)
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
    return Experience(
        batch=batch,
        micros=micros,
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
        inline=passes.way == "inline",
        kept=passes.kept,
    )


def completed(experience: Experience, settings: LearnerSettings) -> Experience:
    """`experience` after its update, with everything an "inline" one could not know before.

    Raises Fatal for a forward pass that was not finite.
    """
    if not experience.inline:
        return experience
    prox, mask = experience.prox_logp, experience.mask
    _require_finite(prox, None, None)
    kl = None
    if experience.ref_logp is not None:
        kl = k1(prox, experience.ref_logp).where(mask, 0.0)
    staleness = settings.staleness
    weights, parts = importance_weights(
        prox, experience.behaviour_logp, mask, staleness.correction, staleness.cap
    )
    return dataclasses.replace(
        experience, inline=False, kl=kl, importance=weights, importance_parts=parts
    )


def batch_trains(batch: RolloutBatch, algorithm: AlgorithmConfig) -> bool:
    """Whether any token of `batch` is left to train on."""
    return algorithm.truncated != "mask" or not bool(batch.truncated.all())


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


def _require_finite(prox: Tensor, ref: Tensor | None, values: Tensor | None) -> None:
    named = {
        "policy log-probabilities": prox,
        "reference log-probabilities": ref,
        "values": values,
    }
    for name, tensor in named.items():
        if tensor is not None and not math.isfinite(float(tensor.sum())):
            raise Fatal(f"the {name} of this step are not finite")
