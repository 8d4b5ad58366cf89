"""Quality gates: what the judgements of a snapshot must reach, and whether they do. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.contracts.config.preferences import QualityConfig
from cluster.contracts.errors import AccordError


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """``value``: what was measured; None where nothing could be, and then the gate is not passed.
    ``why``: the reason in words."""

    name: str
    limit: float
    value: float | None
    passed: bool
    why: str


class HeldBack(AccordError):
    """A snapshot that the quality gates do not let through."""

    def __init__(self, gates: Sequence[Gate]) -> None:
        failed = [gate for gate in gates if not gate.passed]
        super().__init__("the snapshot is held back: " + "; ".join(gate.why for gate in failed))
        self.gates = tuple(gates)


def gates_of(config: QualityConfig, report: Mapping[str, Any], labels: int) -> list[Gate]:
    """Of a ``quality_report``; only gates that the config sets."""
    found = []
    if config.min_labels is not None:
        found.append(_at_least("min_labels", config.min_labels, labels, "labels", ""))
    if config.min_alpha is not None:
        alpha = report["agreement"]["krippendorff_alpha"]
        nothing = "no two annotators judged the same items"
        found.append(_at_least("min_alpha", config.min_alpha, alpha, "alpha", nothing))
    if config.min_gold is not None:
        right = report["gold"]["share"]
        nothing = "no control item was judged"
        found.append(_at_least("min_gold", config.min_gold, right, "gold accuracy", nothing))
    if config.max_position_bias is not None:
        found.append(_position(config.max_position_bias, report["position_bias"]))
    return found


def _at_least(name: str, limit: float, value: float | None, what: str, nothing: str) -> Gate:
    passed = value is not None and value >= limit
    measured = f"{what} is {value:.6g}" if value is not None else nothing
    sign = "at least" if passed else "but must be at least"
    why = f"{measured}, {sign} {limit:g} (quality.{name})"
    return Gate(name=name, limit=limit, value=value, passed=passed, why=why)


def _position(limit: float, bias: Mapping[str, Any]) -> Gate:
    share, p = bias["share"], bias["p"]
    name, value = "max_position_bias", None if share is None else abs(share - 0.5)
    if value is None:
        why = f"no comparison says which completion was shown first (quality.{name})"
        return Gate(name=name, limit=limit, value=None, passed=False, why=why)
    passed = value <= limit or p >= 0.05
    why = (
        f"{share:.3f} of the comparisons prefer the completion shown first, {value:.3f} from 0.5 "
        f"(p = {p:.2g}); {'allowed' if passed else 'but at most'} is {limit:g} (quality.{name})"
    )
    return Gate(name=name, limit=limit, value=value, passed=passed, why=why)


def as_rows(gates: Sequence[Gate]) -> list[dict[str, Any]]:
    return [asdict(gate) for gate in gates]
