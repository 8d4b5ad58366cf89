"""Writing the task as JSONL in the shapes that TRL reads.

Supervised rows are {"messages", "metadata"}, prompt rows {"prompt", "metadata"}. Files are written
beside their place and renamed, so that a reader never sees half of one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from cluster.quickstart.helpdesk.demonstrations import Demonstration
from cluster.quickstart.helpdesk.questions import Question

Row = Mapping[str, object]


def sft_rows(demonstrations: Iterable[Demonstration]) -> Iterator[Row]:
    """{"messages": [user, assistant], "metadata": labels and style} for each demonstration."""
    for demonstration in demonstrations:
        metadata = demonstration.question.metadata() | {"style": demonstration.style}
        yield {"messages": demonstration.messages(), "metadata": metadata}


def prompt_rows(questions: Iterable[Question]) -> Iterator[Row]:
    """{"prompt": [user], "metadata": labels} for each question."""
    for question in questions:
        yield {"prompt": question.messages(), "metadata": question.metadata()}


def write_sft(path: Path, demonstrations: Iterable[Demonstration]) -> int:
    """Write demonstrations as supervised rows; returns the number of rows."""
    return write_jsonl(path, sft_rows(demonstrations))


def write_prompts(path: Path, questions: Iterable[Question]) -> int:
    """Write questions as prompt rows; returns the number of rows."""
    return write_jsonl(path, prompt_rows(questions))


def write_jsonl(path: Path, rows: Iterable[Row]) -> int:
    """Write one JSON object a line, UTF-8, newline at the end; returns the number of rows.

    The folder is made if it is missing. Raises OSError where the disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    count = 0
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count
