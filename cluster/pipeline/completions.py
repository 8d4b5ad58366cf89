"""The files of a round's completions, as those read them who judge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.contracts.rows.messages import read_messages
from reward_service.preferences.records import prompt_hash

PROMPTS = "prompts.jsonl"
COMPLETIONS = "completions.jsonl"


def metadata_in(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Hash of a prompt -> the columns of its row."""
    return {
        prompt_hash(read_messages(row["prompt"], "prompt")): row["metadata"]
        for row in rows_in(folder)
    }


def rows_in(folder: Path) -> list[dict[str, Any]]:
    text = (folder / COMPLETIONS).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]
