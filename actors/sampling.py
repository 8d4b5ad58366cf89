"""All completions of a list of prompts, by several workers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from cluster.contracts.records import Prompt, Rollout


class Sampler(Protocol):
    """A worker that has started, as far as it samples."""

    async def sample(
        self, prompts: Sequence[Prompt], samples: int, timeout_s: float
    ) -> list[Rollout]: ...


async def generate_all(
    workers: Sequence[Sampler],
    prompts: Sequence[Prompt],
    samples: int,
    timeout_s: float,
    chunk: int = 32,
) -> list[Rollout]:
    """All samples of all prompts, unscored, in order, shared out to started ``workers`` as they
    become free. The deadline is for the whole. Raises what a worker raises."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    starts = iter(range(0, len(prompts), chunk))
    answers: dict[int, list[Rollout]] = {}

    async def work(worker: Sampler) -> None:
        for start in starts:
            part = prompts[start : start + chunk]
            left = max(0.0, deadline - loop.time())
            answers[start] = await worker.sample(part, samples, left)

    # Two at once for each, so that the next chunk is there before the last answer is.
    tasks = [asyncio.create_task(work(worker)) for worker in workers for _ in range(2)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return [rollout for start in sorted(answers) for rollout in answers[start]]
