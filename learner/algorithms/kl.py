"""Per-token KL estimators, and the controllers of the KL coefficient.

With x ~ pi and l = log pi(x) - log ref(x), estimating KL(pi || ref) (Schulman, "Approximating KL
divergence"):

    k1 = l                  unbiased, may be negative
    k2 = l^2 / 2            biased value, but its gradient on-policy IS the gradient of the KL
    k3 = exp(-l) - 1 + l    unbiased, never negative, but its gradient is NOT that of the KL
    k3+                     value of k3, gradient of k2 (straight-through)

Put k1 into the reward; use k2 or k3+ as a term of the loss. Off-policy, a loss term has to be
multiplied by the detached ratio of the current to the behaviour policy; that is up to the caller.
Nothing here knows a mask: whatever stands at padding has to be finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""exp(20) is about 5e8: far outside any useful ratio, far inside float32."""

_K3_LIMIT = 10.0


def clamped_log_ratio(logp: Tensor, other_logp: Tensor) -> Tensor:
    """logp - other_logp clamped to +-20; the gradient is zero where the clamp bites."""
    return (logp - other_logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Log ratio, any shape in and out. Unbiased; for the reward."""
    return clamped_log_ratio(logp, ref_logp)


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Half the squared log ratio. Its expected gradient on-policy is exactly that of the KL."""
    return 0.5 * clamped_log_ratio(logp, ref_logp).square()


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """exp(-l) - 1 + l, clamped to +-10. Unbiased and non-negative: for reporting, not as a loss."""
    ratio = clamped_log_ratio(logp, ref_logp)
    return ((-ratio).expm1() + ratio).clamp(-_K3_LIMIT, _K3_LIMIT)


def k3_plus(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Value of `k3` with the gradient of `k2`."""
    carrier = k2(logp, ref_logp)
    # Grouped so that the forward value is k3 exactly: carrier - carrier.detach() is 0.
    return k3(logp, ref_logp).detach() + (carrier - carrier.detach())


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "k3+": k3_plus,
}


class FixedKL:
    """A KL coefficient that the KL does not change; a monitor of the run may set another one."""

    def __init__(self, coef: float) -> None:
        """Raises ValueError for a negative or non-finite coefficient."""
        self.coef = _checked_coef(coef)

    def update(self, kl: float, samples: int) -> None:
        """Does nothing; takes what `AdaptiveKL.update` takes."""

    def state_dict(self) -> dict[str, float]:
        """The current coefficient, a plain float."""
        return {"fixed_coef": self.coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Raises ValueError if the state comes from another controller. An empty one is of a
        checkpoint from when the coefficient could not change."""
        if state:
            _require_keys(self, state, {"fixed_coef"})
            self.coef = _checked_coef(state["fixed_coef"])


class AdaptiveKL:
    """Proportional controller of the KL coefficient (Ziegler et al. 2019, section 2.2).

    e = clip(KL / target - 1, -0.2, 0.2);  coef *= 1 + e * samples / horizon
    """

    def __init__(self, initial: float, target: float, horizon: float) -> None:
        """initial: first coefficient; target: wanted KL in nats per SEQUENCE (summed over tokens,
        averaged over samples); horizon: in samples. Raises ValueError if one is not positive."""
        if not (initial > 0 and target > 0 and horizon > 0):
            raise ValueError(
                "initial, target and horizon of the adaptive KL must be positive, got "
                f"{initial}, {target}, {horizon}"
            )
        self.coef = _checked_coef(initial)
        self.target = float(target)
        self.horizon = float(horizon)

    def update(self, kl: float, samples: int) -> None:
        """Move the coefficient after a batch of `samples` sequences with this mean sequence KL.

        Feed the KL of the batch that was TRAINED on. Raises ValueError for a KL that is not finite
        and for a batch so large against the horizon that the coefficient would not stay positive.
        """
        if not math.isfinite(kl):
            raise ValueError(f"cannot adapt the KL coefficient to a KL of {kl}")
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        factor = 1.0 + error * samples / self.horizon
        if factor <= 0.0:
            raise ValueError(
                f"a batch of {samples} samples is too large for a KL horizon of {self.horizon:g}"
            )
        self.coef *= factor

    def state_dict(self) -> dict[str, float]:
        """The current coefficient, a plain float."""
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Raises ValueError if the state comes from another controller."""
        _require_keys(self, state, {"coef"})
        self.coef = _checked_coef(state["coef"])


def _checked_coef(coef: float) -> float:
    if not (math.isfinite(coef) and coef >= 0.0):
        raise ValueError(f"the KL coefficient must be finite and not negative, got {coef}")
    return float(coef)


def _require_keys(controller: object, state: Mapping[str, float], expected: set[str]) -> None:
    if set(state) != expected:
        raise ValueError(
            f"{type(controller).__name__} expects a state with keys {sorted(expected)}, got "
            f"{sorted(state)}; was the checkpoint written with another KL controller?"
        )
