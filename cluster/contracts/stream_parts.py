"""The parts that a learner step is cut into (`learner.stream_parts`).

A part holds groups whose ids follow each other. Which ones follows from the ids alone, so it is the
same whichever groups came first and whichever failed.
"""

from __future__ import annotations


def part_of(group_id: int, prompts_per_step: int, parts: int) -> int:
    """Which of the ``parts`` of its step a group belongs to, counted from 0."""
    return group_id % prompts_per_step * parts // prompts_per_step
