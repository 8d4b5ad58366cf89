"""What the roles of a run cost, kept in its directory: the next run of the same config on the same
machine, and `accord plan`, begin with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.contracts.config.train import TrainConfig
from cluster.contracts.durable import write_json
from cluster.machine.hardware import processor
from cluster.machine.placement import StepCosts
from cluster.runs.mirror import folder_of

FILE = "cores.json"
# What a step costs does not depend on these.
ELSEWHERE = {"run", "checkpoint", "logging", "monitors", "cluster"}


@dataclass(frozen=True, slots=True)
class KnownCosts:
    """``costs`` None: no run has measured them. ``source``: where they are from, or what was found
    instead, for people. ``step_s``: seconds of its steps."""

    costs: StepCosts | None
    source: str
    step_s: float = 0.0


def costs_key(config: TrainConfig, cores: Sequence[int]) -> str:
    """Of everything that CPU seconds per step depend on: settings, processor, number of cores."""
    tree = config.model_dump(mode="json", exclude=ELSEWHERE)
    del tree["batch"]["steps"]
    text = json.dumps([tree, config.cluster.pin_cores, processor(), len(cores)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_costs(run: Path, key: str, detail: Mapping[str, Any]) -> None:
    """``detail``: as of the event `cores_dealt_out`."""
    write_json(run / FILE, {"key": key, **detail})


def known_costs(config: TrainConfig, cores: Sequence[int]) -> KnownCosts:
    """From the newest run in the folder of runs whose key is that of ``config`` here. A file that
    cannot be read counts as another config's."""
    key, folder, others = costs_key(config, cores), folder_of(config.run.dir), 0
    for file in sorted(folder.glob(f"*/{FILE}"), key=_modified, reverse=True):
        with suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["key"] == key:
                costs, step_s = StepCosts(**found["cpu_s"]), float(found["step_s"])
                return KnownCosts(costs, f"measured by {file.parent}", step_s)
        others += 1
    seen = f"; {others} have measured other settings or another machine" if others else ""
    return KnownCosts(None, f"no run in {folder} has measured this config here{seen}")


def _modified(file: Path) -> float:
    with suppress(OSError):
        return file.stat().st_mtime
    return 0.0
