"""A step whose memory runs out is tried again in smaller microbatches: the same global batch, with
gradients that add up to the same sums."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch

from learner.rl.checkpoint import TrainerState, random_states, set_random_states
from learner.rl.rollouts import RolloutBatch
from learner.settings import LearnerSettings

T = TypeVar("T")
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


def in_smaller_parts(
    work: Callable[[LearnerSettings], T],
    settings: LearnerSettings,
    state: TrainerState,
    rollouts: RolloutBatch,
) -> tuple[T, LearnerSettings]:
    """``work(settings)``, and the settings with which it was done: those given or, as often as
    memory runs out, with half the ``learner.tokens_per_microbatch`` of before.

    Raises the error of memory when a weight may have changed already, when the longest completion
    is alone in its microbatch, and in a learner of several processes: the others would wait.
    """
    random = random_states()
    while True:
        skipped = state.optimizers.skipped
        with _updates_of(state) as updates:
            try:
                return work(settings), settings
            except OUT_OF_MEMORY:
                unchanged = not updates and state.optimizers.skipped == skipped
                smallest = settings.learner.tokens_per_microbatch <= int(rollouts.lengths.max())
                if not unchanged or smallest or state.networks.ranks.size > 1:
                    raise
        # Only here, where the error is gone and with it what its frames held.
        settings = _halved(settings)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        set_random_states(random)


@contextlib.contextmanager
def _updates_of(state: TrainerState) -> Iterator[list[None]]:
    """Gets an entry as soon as an optimiser begins to change weights."""
    updates: list[None] = []
    optimizers = [state.optimizers.policy, state.optimizers.value]
    hooks = [
        optimizer.register_step_pre_hook(lambda *_: updates.append(None))
        for optimizer in optimizers
        if optimizer is not None
    ]
    try:
        yield updates
    finally:
        for hook in hooks:
            hook.remove()


def _halved(settings: LearnerSettings) -> LearnerSettings:
    half = settings.learner.tokens_per_microbatch // 2
    learner = settings.learner.model_copy(update={"tokens_per_microbatch": half})
    return replace(settings, learner=learner)
