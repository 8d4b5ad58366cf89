"""Whether an engine computes what the learner computes, over one fixed sequence of tokens.

The proof of a swap (`Engine.prove`) says which weights are in force. The canary says that the
engine makes the right numbers of them: its kernels, its model code, its cache.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.contracts.errors import EngineFailure, WeightMismatch
from cluster.contracts.records import Canary

# An engine's rounding noise, nats. Measured against the learner: 5e-6 in float32 (the largest of 31
# tokens), 4e-3 to 5e-2 in bfloat16 and 6e-2 to 2e-1 in int8 (median). An engine that has shown less
# may yet show as much. fp8 has not been measured: its numbers have as many bits as int8's.
_NOISE = {"float32": 5e-6, "bfloat16": 2.5e-3, "int8": 0.025, "fp8": 0.025}
_CEILING = {"float32": 1e-3, "bfloat16": 0.5, "int8": 1.0, "fp8": 1.0}
_NOISE_FACTOR = 20.0  # how far over the noise measured so far a difference may lie
_MEASURABLE = 4.0  # two canaries differ measurably when this many times the noise lies between


@dataclass(slots=True)
class CanaryCheck:
    """Compares one worker's canaries, in order; remembers its noise and the last canary."""

    _noise: float | None = None  # largest accepted distance so far
    _last: Canary | None = None

    def compare(self, canary: Canary, got: Sequence[float], version: int, dtype: str) -> float:
        """Distance in nats between engine and learner, see `distance`. dtype: the engine's, or the
        type in 8 bits of its matrices.

        The limit is `canary.tolerance`, or, where that is None, 20 times the largest distance
        accepted before, but within 1e-4 and 1e-3 in float32, within 0.05 and 0.5 in bfloat16,
        within 0.5 and 1 in 8 bits.
        Where the new canary and the one before differ by 4 times the noise, the engine's answer
        must be nearer to the new one.
        Raises EngineFailure for a number that is not finite, WeightMismatch for the rest.
        """
        if len(got) != len(canary.logprobs):
            raise WeightMismatch(
                f"version {version}: canary of {len(canary.logprobs)} log-probabilities, "
                f"got {len(got)}"
            )
        if not all(map(math.isfinite, got)):
            raise EngineFailure(
                f"version {version}: the engine computes a log-probability that is not finite"
            )
        found = distance(got, canary.logprobs, dtype)
        limit = self._limit(dtype) if canary.tolerance is None else canary.tolerance
        if not found <= limit:
            raise WeightMismatch(
                f"version {version}: the engine's log-probabilities of the canary differ from the "
                f"learner's by {found:.3g} (limit {limit:.3g}): it does not compute what the "
                "published weights give"
            )
        self._require_nearer(canary, got, version, dtype)
        self._noise = max(found, self._noise or 0.0)
        self._last = canary
        return found

    def _limit(self, dtype: str) -> float:
        if self._noise is None:
            return _CEILING[dtype]
        return min(_CEILING[dtype], _NOISE_FACTOR * max(self._noise, _NOISE[dtype]))

    def _require_nearer(
        self, canary: Canary, got: Sequence[float], version: int, dtype: str
    ) -> None:
        last = self._last
        if last is None or last.token_ids != canary.token_ids or self._noise is None:
            return
        # Means, not medians: a step may move a few tokens of the sequence only.
        moved = _mean_distance(canary.logprobs, last.logprobs)
        to_new, to_last = (_mean_distance(got, c.logprobs) for c in (canary, last))
        measurable = _MEASURABLE * max(self._noise, _NOISE[dtype])
        if moved > measurable and not to_new < to_last:
            raise WeightMismatch(
                f"version {version}: the engine's canary is nearer to the version before "
                f"({to_last:.3g}) than to this one ({to_new:.3g}), and the two are {moved:.3g} "
                "apart: it still computes with the old weights"
            )


def distance(got: Sequence[float], wanted: Sequence[float], dtype: str) -> float:
    """The largest |difference| in float32; else the median: in bfloat16 a single improbable token
    can be off by more than 0.5 in a large and healthy model."""
    every = [abs(a - b) for a, b in zip(got, wanted, strict=True)]
    return max(every) if dtype == "float32" else statistics.median(every)


def _mean_distance(a: Sequence[float], b: Sequence[float]) -> float:
    return statistics.fmean(abs(x - y) for x, y in zip(a, b, strict=True))
