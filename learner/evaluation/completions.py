"""A few completions of a training run, from its rollouts, with why each is shown."""

from __future__ import annotations

import random
from dataclasses import dataclass

from cluster.contracts.errors import UserError
from cluster.contracts.samples import SampleInfo, pick, prompt_text, read_samples, sampled_steps
from learner.evaluation.run_files import RunFiles

SEED = 0


@dataclass(frozen=True, slots=True)
class Shown:
    """``parts``: score by reward source, where there are several."""

    reason: str
    prompt: str
    completion: str
    score: float | None
    parts: dict[str, float]
    cut: bool
    tokens: int


def of_training(files: RunFiles) -> list[Shown]:
    """One of the first step; of the last, one drawn by chance, the best and the worst."""
    steps = sampled_steps(files.directory)
    if not steps:
        return []
    found: list[Shown] = []
    try:
        first = read_samples(files.directory, steps[0])
        found.append(_shown(f"first step ({steps[0]}), random", pick_random(first)))
        if steps[-1] != steps[0]:
            last = read_samples(files.directory, steps[-1])
            found.append(_shown(f"last step ({steps[-1]}), random", pick_random(last)))
            best_and_worst = {why: sample for why, sample in pick(last, 2, SEED) if why != "random"}
            found += [
                _shown(f"last step ({steps[-1]}), {why}", sample)
                for why, sample in best_and_worst.items()
            ]
    except UserError as problem:
        files.note("rollouts", str(problem).split("\n")[0])
    return found


def pick_random(samples: list[SampleInfo]) -> SampleInfo:
    """Drawn by a fixed seed, whatever it contains."""
    return random.Random(SEED).choice(samples)


def _shown(reason: str, sample: SampleInfo) -> Shown:
    return Shown(
        reason=reason,
        prompt=prompt_text(sample.prompt),
        completion=sample.completion,
        score=sample.score,
        parts=dict(sample.parts) if len(sample.parts) > 1 else {},
        cut=sample.finish_reason == "length",
        tokens=sample.tokens,
    )
