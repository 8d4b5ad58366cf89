"""How long a step takes when generation, scoring and training overlap: the model, no measuring.

Little's law on the samples that a staleness bound allows to be outstanding. Everything is in
seconds per learner step unless said otherwise. `accord plan` fills it from a probe and
`accord simulate` compares it with the real controller on a virtual clock.

Against event simulations (answers' lengths lognormal, mean generation and training time equal) it
is within a few percent away from the knee and up to 20 % too fast exactly where two of its terms
meet, which is why ``needed_bound`` adds one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Term = Literal["generation", "scoring", "learner", "staleness", "cores"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """What each role needs for the samples of one step, were it never to wait.

    generate_s: answer tokens of a step / tokens per second of all workers with their slots full.
    learn_s: the learner's step; publish_s: from its end until the workers hold the new weights.
    sample_s: mean time a sample takes from its first to its last token (``sample_latency``).
    score_s: time from a finished sample to its reward; scoring_s: what scoring a whole step takes
    the reward service, all replicas at work.
    generation_stall_s, learner_stall_s: what one weight update takes from either side.
    shared_s: where all roles share the same cores, their CPU-seconds together over the cores.
    tail: time to generate one step's samples from a standing start, over ``generate_s``, at least
    1. The workers run out of samples while the longest answers end, which is felt at bound 0 only.
    """

    generate_s: float
    learn_s: float
    sample_s: float
    publish_s: float = 0.0
    score_s: float = 0.0
    scoring_s: float = 0.0
    generation_stall_s: float = 0.0
    learner_stall_s: float = 0.0
    shared_s: float = 0.0
    tail: float = 1.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} = {value}: a time cannot be negative")
        if self.generate_s <= 0 or self.learn_s <= 0 or self.tail < 1:
            raise ValueError("generate_s and learn_s must be over 0 and tail at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPrediction:
    """``terms``: seconds each limit alone would allow; the largest is the step.

    ``generation_busy`` and ``learner_busy``: share of the step either side works (0 to 1).
    """

    step_s: float
    bottleneck: Term
    terms: dict[Term, float]
    generation_busy: float
    learner_busy: float


def predict(times: StepTimes, bound: int) -> StepPrediction:
    """Step time with samples at most ``bound`` learner steps old when they are trained.

    bound > 0: T = max{ Tg + s_g, Tr, Tt + s_L, (L + t_r + Tt + Ts) / (bound + 1/2) }. The last
    term is Little's law: at most (bound + 1) steps' samples are outstanding, and a sample waits
    half a step on average for its batch. bound = 0 is the barrier, T = tail Tg + t_r + Tt + Ts.
    Raises ValueError for a negative bound.
    """
    if bound < 0:
        raise ValueError(f"a staleness bound of {bound}")
    generation = times.generate_s + times.generation_stall_s
    learner = times.learn_s + times.learner_stall_s
    if bound == 0:
        barrier = times.tail * times.generate_s + times.score_s + times.learn_s + times.publish_s
    else:
        outstanding = times.sample_s + times.score_s + times.learn_s + times.publish_s
        barrier = outstanding / (bound + 0.5)
    terms: dict[Term, float] = {
        "generation": generation,
        "scoring": times.scoring_s,
        "learner": learner,
        "staleness": barrier,
        "cores": times.shared_s,
    }
    bottleneck = max(terms, key=lambda name: terms[name])
    step_s = terms[bottleneck]
    return StepPrediction(
        step_s=step_s,
        bottleneck=bottleneck,
        terms=terms,
        generation_busy=min(1.0, times.generate_s / step_s),
        learner_busy=min(1.0, times.learn_s / step_s),
    )


def ideal_step(times: StepTimes) -> float:
    """Step time with everything overlapped: the slowest role's own time."""
    return max(times.generate_s, times.scoring_s, times.learn_s, times.shared_s)


def needed_bound(slots: int, samples: int) -> int:
    """Staleness bound from which on it costs nothing: ceil(S / B) + 1.

    slots: samples all workers decode at once (S); samples: those of a learner step (B). With it the
    step is within 1 % of ``ideal_step`` for S/B from 1/4 to 4 and a coefficient of variation of the
    lengths up to 1.5.
    """
    return -(-slots // samples) + 1


def sample_latency(generate_s: float, slots: int, samples: int) -> float:
    """Mean seconds from a sample's first to its last token with all slots full: Tg S / B."""
    return generate_s * slots / samples


def workers_for(generate_one_s: float, learn_s: float) -> int:
    """Workers that saturate the learner: the fewest that generate a step while one is trained.

    generate_one_s: ``generate_s`` of a single worker.
    """
    return max(1, math.ceil(generate_one_s / learn_s - 1e-9))


def learner_share(generate_one_s: float, learn_s: float) -> float:
    """Share of the cores (or GPUs) the learner should have, where both sides scale with them."""
    return learn_s / (generate_one_s + learn_s)
