"""The advantage estimator and the policy loss that a config names, with their options put in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from cluster.contracts.config.algorithm import AlgorithmConfig
from cluster.contracts.plugins import guarded
from cluster.contracts.registry import ADVANTAGE_ESTIMATORS, POLICY_LOSSES, Registry
from learner.algorithms.advantages import ESTIMATORS, AdvantageInputs, Advantages
from learner.algorithms.loss_terms import LossTerms
from learner.algorithms.policy_loss import POLICY_LOSSES as BUILT_IN_LOSSES


def chosen_loss(algorithm: AlgorithmConfig) -> Callable[..., LossTerms]:
    """(logp, prox_logp, advantages, mask) -> LossTerms, all [B, T]. Raises UserError for a loss
    that no plugin of this process registers."""
    word = algorithm.loss
    loss = POLICY_LOSSES[word]
    function = _function(POLICY_LOSSES, word, loss.function, BUILT_IN_LOSSES)
    # Bound once per update, not looked up for each microbatch.
    return partial(function, **_options(algorithm, loss.options, algorithm.loss_options))


def chosen_estimator(algorithm: AlgorithmConfig) -> Callable[[AdvantageInputs], Advantages]:
    """Raises UserError for an estimator that no plugin of this process registers."""
    word = algorithm.advantage
    estimator = ADVANTAGE_ESTIMATORS[word]
    function = _function(ADVANTAGE_ESTIMATORS, word, estimator.function, ESTIMATORS)
    return partial(function, **_options(algorithm, estimator.options, algorithm.advantage_options))


def whitened(algorithm: AlgorithmConfig) -> bool:
    """GAE and REINFORCE++ whiten by definition, GRPO and RLOO compare within a group instead."""
    return algorithm.whiten_advantages and ADVANTAGE_ESTIMATORS[algorithm.advantage].whitens


def _function(
    known: Registry[Any],
    word: str,
    plugin: Callable[..., Any] | None,
    built_in: Mapping[str, Callable[..., Any]],
) -> Callable[..., Any]:
    if plugin is None:
        return built_in[word]
    return guarded(plugin, known.origin(word), f"the {known.what} {word!r}")


def _options(
    algorithm: AlgorithmConfig, names: Sequence[str], given: Mapping[str, Any]
) -> dict[str, Any]:
    # What is not set is the function's own default: sensible limits differ much between losses.
    keys = {name: getattr(algorithm, name, None) for name in names}
    return {name: value for name, value in keys.items() if value is not None} | dict(given)
