"""`trainer.json` of a checkpoint, as far as the driver has to write it. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.contracts.durable import write_text

TRAINER = "trainer.json"
_COEFFICIENT = {"FixedKL": "fixed_coef", "AdaptiveKL": "coef"}


def moved_on(source: Path, target: Path, *, version: int, kl_coef: float) -> None:
    """Write the state of `source` as that of another version, with another KL coefficient."""
    trainer: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    kl = trainer["kl"]
    kl[_COEFFICIENT[kl["controller"]]] = kl_coef
    trainer["version"] = version
    write_text(target, json.dumps(trainer, indent=2, allow_nan=False) + "\n")
