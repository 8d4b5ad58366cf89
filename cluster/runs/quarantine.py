"""Prompts that a run has set aside because they kill workers: quarantine.jsonl, one a line.

A resumed run does not give them out either. Who has mended the cause takes the line out.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from cluster.runs.rows import Follower

FILE = "quarantine.jsonl"  # {"prompt": its id, "where": file and row, "cause", ...}


def quarantined(run_dir: Path) -> dict[str, str]:
    """Ids of the prompts, each with the cause. A damaged line is passed over."""
    rows = Follower(run_dir / FILE).new_rows()
    return {str(row["prompt"]): str(row.get("cause", "")) for row in rows if "prompt" in row}


def put_in_quarantine(run_dir: Path, row: dict[str, Any]) -> None:
    """On disk before the prompt can kill another worker."""
    with (run_dir / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
