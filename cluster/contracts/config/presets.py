"""Settings that go together, by the name people know them under."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.contracts.errors import UserError

# KL as a loss term with its own gradient, since the advantage compares completions of one prompt.
_KL_IN_LOSS = {"place": "loss", "estimator": "k3+"}

ALGORITHMS: Mapping[str, Mapping[str, Any]] = {
    "ppo": {"advantage": "gae"},
    "grpo": {"advantage": "grpo", "aggregate": "seq-mean-token-mean", "kl": _KL_IN_LOSS},
    "rloo": {"advantage": "rloo"},
    "reinforce++": {"advantage": "reinforce++"},
    "reinforce-baseline": {"advantage": "reinforce-baseline"},
    "gspo": {
        "advantage": "grpo",
        "loss": "gspo",
        "aggregate": "seq-mean-token-mean",
        "kl": _KL_IN_LOSS,
    },
    "cispo": {"advantage": "grpo", "loss": "cispo", "kl": _KL_IN_LOSS},
}


def algorithm_settings(name: str) -> dict[str, Any]:
    """The ``[algorithm]`` table of a name. Raises UserError for an unknown one."""
    if name not in ALGORITHMS:
        raise UserError(
            f"unknown algorithm {name!r}",
            where="algorithm",
            fix=f"choose from {', '.join(ALGORITHMS)}, or set algorithm.advantage and "
            "algorithm.loss in config",
        )
    found = dict(ALGORITHMS[name])
    return {**found, "kl": dict(found["kl"])} if "kl" in found else found
