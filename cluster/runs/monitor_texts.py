"""What each alarm says: what is wrong, with the numbers, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Figures(Protocol):
    """What a text names of a monitor's reading."""

    @property
    def value(self) -> float: ...

    @property
    def limit(self) -> float: ...

    @property
    def before(self) -> float: ...


def _constant(reading: Figures) -> str:
    return (
        f"Every completion gets the score {reading.value:.3g}, so there is nothing to learn from. "
        "Read samples of the run and check the reward."
    )


def _signal(reading: Figures) -> str:
    return (
        f"In {reading.value:.0%} of the groups all completions have the same score, so those "
        "groups teach nothing. Use prompts of mixed difficulty, a finer reward or more "
        "batch.samples_per_prompt."
    )


def _entropy(reading: Figures) -> str:
    return (
        f"The policy's entropy fell from {reading.before:.2g} to {reading.value:.2g} nats per "
        "token: its completions become all alike. Lower learner.lr, raise algorithm.entropy_coef "
        "or algorithm.kl.coef, or go back to an earlier checkpoint."
    )


def _kl(reading: Figures) -> str:
    return (
        f"The KL to the reference is {reading.value:.3g} nats per completion, over the budget of "
        f"{reading.limit:.3g}: the policy is far from where it started. Raise algorithm.kl.coef, "
        "lower learner.lr, or go back to an earlier checkpoint."
    )


def _mismatch(reading: Figures) -> str:
    return (
        f"Engine and learner are {reading.value:.2g} nats per token apart with the same weights, "
        f"over {reading.limit:.2g}: completions come from another policy than the one that is "
        "trained. Set rollout.dtype or rollout.quantization to a more exact one, or "
        "staleness.correction = 'token-tis'."
    )


def _effective(reading: Figures) -> str:
    return (
        f"The weights of {reading.value:.0%} of the tokens make up the step (limit "
        f"{reading.limit:.0%}): the completions are too far from the policy that learns from "
        "them. Lower staleness.bound or learner.lr, or set rollout.dtype or rollout.quantization "
        "to a more exact one."
    )


def _jump(reading: Figures) -> str:
    return (
        f"The mean score went from {reading.before:.3g} to {reading.value:.3g} within a step: "
        "read samples of this step; the policy may have found a way around the reward, or the "
        "reward changed. Lower learner.lr if it is neither."
    )


def _clipped(reading: Figures) -> str:
    return (
        f"{reading.value:.0%} of the completions are cut at rollout.max_tokens before they end. "
        "Raise rollout.max_tokens, or set algorithm.missing_eos_penalty."
    )


def _length(reading: Figures) -> str:
    return (
        f"Completions went from {reading.before:.3g} to {reading.value:.3g} tokens on average: "
        "the reward may pay for length. Read samples, and check the reward on completions of "
        "equal quality and other lengths."
    )


def _repetition(reading: Figures) -> str:
    return (
        f"{reading.value:.0%} of the sequences of four tokens repeat an earlier one of the same "
        "completion: the policy writes in loops. Read samples, raise algorithm.kl.coef, or go "
        "back to an earlier checkpoint."
    )


def _refusals(reading: Figures) -> str:
    return (
        f"The share of completions that refuse went from {reading.before:.0%} to "
        f"{reading.value:.0%}. Read samples: the reward may pay for refusing, or for never doing "
        "so."
    )


def _disagreement(reading: Figures) -> str:
    return (
        f"The reward models disagree by {reading.value:.3g}, at the start by {reading.before:.3g}: "
        "the policy writes what they were not trained on. Label samples of this policy and train "
        "the reward models again, or raise algorithm.kl.coef."
    )


def _held_out(reading: Figures) -> str:
    return (
        f"The held-out score fell from {reading.before:.3g} to {reading.value:.3g} while the "
        "training reward rose: the policy is over-optimised. Use an earlier checkpoint, raise "
        "algorithm.kl.coef, or train the reward model on samples of this policy."
    )


def _second_judge(reading: Figures) -> str:
    return (
        f"The second judge's mean score fell from {reading.before:.3g} to {reading.value:.3g} "
        "while the training reward rose: the policy is over-optimised. Use an earlier checkpoint, "
        "raise algorithm.kl.coef, or train the reward model on samples of this policy."
    )


TEXTS: dict[str, Callable[[Figures], str]] = {
    "constant-reward": _constant,
    "no-learning-signal": _signal,
    "entropy-collapse": _entropy,
    "engine-mismatch": _mismatch,
    "effective-samples": _effective,
    "kl-budget": _kl,
    "reward-jump": _jump,
    "clipped-completions": _clipped,
    "length-drift": _length,
    "repetition": _repetition,
    "refusals": _refusals,
    "ensemble-disagreement": _disagreement,
    "held-out-gap": _held_out,
    "second-judge-gap": _second_judge,
}
"""By the name of the monitor."""
