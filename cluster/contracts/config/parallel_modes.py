"""Which ways of training go together. One table, for all sections that train.

A mode is named as its key. Pairs that are not listed go together, and are compared with one process
by `benchmarks/parallel_modes.py`. What depends on the model (numbers of heads, a plan for tensor
parallelism, sliding windows) is checked when it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Refusal:
    """Two modes that do not go together, the reason, and which one to leave out."""

    modes: tuple[str, str]
    why: str
    leave: str


PAIRS: tuple[Refusal, ...] = (
    Refusal(
        ("compile", "sharding"),
        "compiled layers do not gather sharded weights",
        "compile",
    ),
    Refusal(
        ("compile", "tensor_parallel"),
        "the plan replaces the forward passes that torch.compile has traced",
        "compile",
    ),
    Refusal(
        ("compile", "sequence_parallel"),
        "torch.compile does not trace the exchange of heads between processes",
        "compile",
    ),
)


def mode_problems(section: str, modes: Iterable[str]) -> list[str]:
    """One sentence for each pair of `modes`, keys of `section`, that does not go together."""
    on = set(modes)
    return [
        f"{section}.{pair.modes[0]} cannot be had together with {section}.{pair.modes[1]}: "
        f"{pair.why}. Leave {section}.{pair.leave} out"
        for pair in PAIRS
        if on.issuperset(pair.modes)
    ]
