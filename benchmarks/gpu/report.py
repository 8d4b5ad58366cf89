"""The record of one part: what it found, whether that is within its limits, and where it ran."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.record import provenance


@dataclass(frozen=True, slots=True)
class Check:
    """``value`` has to be at most (``at_least`` False) or at least ``limit``. A limit of None is
    not demanded: the figure is only noted."""

    name: str
    value: float
    limit: float | None
    at_least: bool = False

    @property
    def ok(self) -> bool:
        if self.limit is None:
            return True
        # A figure that is not a number satisfies nothing.
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(slots=True)
class Found:
    """What a part collects: figures to be read, and checks that can fail."""

    figures: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    def at_most(self, name: str, value: float, limit: float | None) -> None:
        self.checks.append(Check(name, float(value), limit))

    def at_least(self, name: str, value: float, limit: float | None) -> None:
        self.checks.append(Check(name, float(value), limit, at_least=True))

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.ok]


def write(path: Path, part: str, found: Found, seconds: float, device: Mapping[str, Any]) -> None:
    """Written whole or not at all: a part that was killed while writing is run again."""
    content = {
        "part": part,
        "ok": not found.failed,
        "seconds": round(seconds, 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "device": dict(device),
        "checks": [{**asdict(check), "ok": check.ok} for check in found.checks],
        "figures": found.figures,
        **provenance(),
    }
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    partial.replace(path)


def read(path: Path) -> dict[str, Any] | None:
    """A part's record, None where it has none."""
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def device_facts() -> dict[str, Any]:
    """Which device torch sees in this process."""
    import torch

    if not torch.cuda.is_available():
        return {"kind": "cpu"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "kind": "cuda",
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }
