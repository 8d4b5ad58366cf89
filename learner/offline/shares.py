"""Which microbatches each process of a fit runs."""

from __future__ import annotations

from collections.abc import Sequence

from learner.compute.microbatches import plan_microbatches
from learner.compute.ranks import Ranks


def shares(lengths: Sequence[int], budget: int, ranks: Ranks) -> list[tuple[list[int], bool]]:
    """This rank's microbatches of rows of these lengths: (indices, whether it counts).

    budget: tokens of a microbatch, padding included. One that does not count is run only because
    sharded weights need every rank in every pass (`Ranks.deal`); nothing may come of it.
    One process gets the plan of `plan_microbatches`. Several get as many microbatches each, of
    about the same cost, so that none waits for long.
    """
    plan = plan_microbatches(lengths, budget)
    if ranks.size > 1:
        plan = _even(lengths, budget, plan, ranks.size)
    return ranks.deal(plan, lambda part: len(part) * lengths[part[0]])


def _even(lengths: Sequence[int], budget: int, plan: list[list[int]], size: int) -> list[list[int]]:
    """The plan of the smallest budget that makes no more microbatches than a multiple of `size`
    allows: the multiple that the plan at the full budget needs."""
    most = -(-len(plan) // size) * size
    low, high = 1, budget  # the plan at `high` has at most `most` microbatches
    while low < high:
        middle = (low + high) // 2
        tried = plan_microbatches(lengths, middle)
        if len(tried) <= most:
            plan, high = tried, middle
        else:
            low = middle + 1
    return plan
