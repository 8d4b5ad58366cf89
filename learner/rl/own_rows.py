"""Which rows of a step each process computes: it holds the numbers of these and of no others.

Processes that share the step (`Mesh.data`) get whole groups where the advantage estimator compares
the completions of a group, and single rows otherwise. They keep them for the whole step, so nothing
of the size of a completion ever travels between them: sums do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.contracts.config.algorithm import AlgorithmConfig
from cluster.contracts.errors import Fatal
from cluster.contracts.registry import ADVANTAGE_ESTIMATORS
from learner.compute.ranks import SINGLE, Ranks
from learner.rl.rollouts import Array, RolloutBatch
from learner.settings import LearnerSettings


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OwnRows:
    """lengths: int64 [B], tokens of all rows. owner: int64 [B], the rank that has a row. place:
    int64 [B], where a row is among those of its owner. ranks: those that share the step. batch:
    this one's rows, in the order of the step."""

    lengths: Array
    owner: Array
    place: Array
    ranks: Ranks
    batch: RolloutBatch

    @classmethod
    def of(cls, batch: RolloutBatch, owner: Array, ranks: Ranks) -> OwnRows:
        place = np.zeros(len(batch), dtype=np.int64)
        for rank in range(ranks.size):
            held = np.flatnonzero(owner == rank)
            place[held] = np.arange(len(held))
        alone = ranks.size == 1
        return cls(
            lengths=batch.lengths,
            owner=owner,
            place=place,
            ranks=ranks,
            batch=batch if alone else batch.take(np.flatnonzero(owner == ranks.rank)),
        )

    @classmethod
    def all_of(cls, batch: RolloutBatch) -> OwnRows:
        return cls.of(batch, np.zeros(len(batch), dtype=np.int64), SINGLE)


def deal_rows(
    batch: RolloutBatch, settings: LearnerSettings, step: int, ranks: Ranks = SINGLE
) -> OwnRows:
    """The rows of a step, dealt out so that each rank has about as many tokens in each of its
    minibatches. Every rank finds the same. Raises Fatal for fewer groups than ranks."""
    if ranks.size == 1:
        return OwnRows.all_of(batch)
    units = np.arange(len(batch))
    if ADVANTAGE_ESTIMATORS[settings.algorithm.advantage].needs_groups:
        _, units = np.unique(batch.group_ids, return_inverse=True)
    parts = minibatches(settings, step, len(batch))
    costs = np.zeros((int(units.max()) + 1, len(parts)))
    for column, rows in enumerate(parts):
        np.add.at(costs[:, column], units[rows], batch.lengths[rows])
    return OwnRows.of(batch, deal_units(costs, ranks.size)[units], ranks)


def deal_units(costs: Array, size: int) -> Array:
    """int64 [U]: to which of `size` ranks each unit goes. costs: [U, M], in each minibatch.

    Dearest first, to the rank that has least where the unit has most, and least of all among
    those. Raises Fatal for fewer units than ranks.
    """
    if len(costs) < size:
        raise Fatal(
            f"a step of {len(costs)} groups cannot be shared by {size} groups of processes: raise "
            "batch.prompts_per_step, or lower learner.processes"
        )
    owner = np.zeros(len(costs), dtype=np.int64)
    loads = np.zeros((size, costs.shape[1]))
    for unit in np.argsort(-costs.sum(axis=1), kind="stable"):
        chosen = np.lexsort((loads.sum(axis=1), loads @ costs[unit]))[0]
        owner[unit] = chosen
        loads[chosen] += costs[unit]
    return owner


def minibatches(settings: LearnerSettings, step: int, samples: int) -> list[Array]:
    """The rows of each optimiser step of a learner step, sorted, all epochs in order: a pure
    function of (seed, step, epoch), so nothing about it has to be kept in a checkpoint."""
    learner = settings.learner
    found: list[Array] = []
    for epoch in range(learner.epochs):
        shuffled = np.random.default_rng([settings.seed, step, epoch]).permutation(samples)
        # Sorted: equal sets of rows share the tensors that were made of them.
        found += [np.sort(rows) for rows in np.array_split(shuffled, learner.minibatches)]
    return found


def trained_tokens(batch: RolloutBatch, algorithm: AlgorithmConfig) -> Array:
    """int64 [B]: tokens of each row that are in the loss (see `algorithm.truncated`)."""
    lengths: Array = batch.response_ids.lengths
    return np.where(batch.truncated, 0, lengths) if algorithm.truncated == "mask" else lengths
