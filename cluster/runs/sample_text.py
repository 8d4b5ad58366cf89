"""Completions as text: a table of a few, a line each, or one after the other in full."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size

from cluster.contracts.samples import SampleInfo, prompt_text
from cluster.runs.console import plain_text

NARROWEST, WIDEST = 72, 160  # columns of the table


def table_lines(picked: Sequence[tuple[str, SampleInfo]], width: int | None = None) -> list[str]:
    """A line per sample: why it is shown, score, tokens, the prompt's last message, completion.

    ``width`` in columns of the terminal; letters that take two columns are counted as two.
    """
    columns = width or shutil.get_terminal_size((120, 24)).columns
    room = min(max(columns, NARROWEST), WIDEST) - 27  # the columns before, and gaps
    prompt, completion = room // 3, room - room // 3
    lines = [f"  {'':<6} {'score':>7} {'tokens':>6}  {_cell('prompt', prompt)}  completion"]
    for reason, sample in picked:
        score = "" if sample.score is None else f"{sample.score:+.3f}"
        lines.append(
            f"  {reason:<6} {score:>7} {sample.tokens:>6}  "
            f"{_cell(str(sample.prompt[-1]['content']), prompt)}  "
            f"{_cell(sample.completion, completion)}".rstrip()
        )
    return lines


def sample_lines(reason: str, sample: SampleInfo) -> list[str]:
    """Everything that is known of a sample, its prompt and its completion in full."""
    parts = ", ".join(f"{name} {value:+.3f}" for name, value in sample.parts.items())
    facts = [] if sample.score is None else [f"score {sample.score:+.3f}"]
    facts += [f"parts: {parts}"] if len(sample.parts) > 1 else []
    facts += [f"vetoed by {', '.join(sample.vetoes)}"] if sample.vetoes else []
    facts.append(f"{sample.tokens} tokens")
    facts += ["cut at max_tokens"] if sample.finish_reason == "length" else []
    facts += [f"policy version {_versions(sample.versions)}"] if sample.versions else []
    facts.append(f"group {sample.group}, sample {sample.sample}")
    return [
        f"{reason}: {'; '.join(facts)}",
        "  prompt",
        *_indented(prompt_text(sample.prompt)),
        "  completion",
        *_indented(sample.completion),
    ]


def _versions(versions: tuple[int, int]) -> str:
    first, last = versions
    return str(first) if first == last else f"{first} to {last}"


def _indented(text: str) -> list[str]:
    return [f"    {line}".rstrip() for line in plain_text(text).splitlines() or [""]]


def _cell(text: str, width: int) -> str:
    """One line of exactly ``width`` columns; what was cut off is marked."""
    line = plain_text(" ".join(text.split()))
    if cell_len(line) > width:
        line = set_cell_size(line, width - 1).rstrip() + "…"
    return set_cell_size(line, width)
