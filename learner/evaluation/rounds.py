"""The rounds of a pipeline as its report tells them, from pipeline.json and the folders it names.

Nothing here raises for a part that is missing or damaged: it is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cluster.contracts.errors import UserError
from learner.evaluation.labels_panel import Table, agreement_words
from learner.evaluation.page import number_text, plain
from learner.evaluation.run_files import Row, RunFiles, number
from learner.evaluation.samples import Sample, read_samples

FILE = "pipeline.json"
AGAINST = {"against_start": "the start", "against_before": "the round before"}
SHOWN_PROMPTS = 3
HASH = 8  # characters of a hash in the figure


@dataclass(frozen=True, slots=True)
class Stage:
    """``report``: path of its own report, relative to the pipeline's."""

    round: int
    name: str
    status: str
    seconds: float | None
    detail: str
    run: str
    report: str
    made: tuple[tuple[str, str], ...]  # name and beginning of the hash
    parents: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rates:
    """Win rates of the rounds that were evaluated: 95 % interval from ``low`` to ``high``."""

    label: str
    rounds: tuple[int, ...]
    rate: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ByRound:
    """What the policies of the rounds wrote for one prompt: (which, completion, score)."""

    prompt: str
    completions: tuple[tuple[str, str, float | None], ...]


@dataclass(frozen=True, slots=True)
class Rounds:
    stages: tuple[Stage, ...]
    table: Table
    rates: tuple[Rates, ...]
    samples: tuple[ByRound, ...]

    @property
    def chains(self) -> list[tuple[int, list[Stage]]]:
        """The stages of each round, for the figure."""
        numbers = sorted({stage.round for stage in self.stages})
        return [(n, [stage for stage in self.stages if stage.round == n]) for n in numbers]


def read_rounds(files: RunFiles) -> Rounds | None:
    """None for a run that is no pipeline."""
    if not (files.directory / FILE).exists():
        return None
    content = files.json_object(FILE) or {}
    listed = content.get("stages")
    rows = [row for row in (listed if isinstance(listed, list) else []) if isinstance(row, dict)]
    numbers = sorted({n for row in rows if (n := _round(row)) > 0})
    return Rounds(
        stages=tuple(_stage(files.directory, row) for row in rows),
        table=_table(files.directory, rows, numbers),
        rates=tuple(_rates(rows, key, label) for key, label in AGAINST.items()),
        samples=tuple(_samples(files.directory, numbers)),
    )


def stage_runs(files: RunFiles) -> list[Path]:
    """Run directories of the stages that are there."""
    rounds = read_rounds(files)
    runs = [files.directory / stage.run for stage in rounds.stages if stage.run] if rounds else []
    return [run for run in runs if (run / "manifest.json").is_file()]


def _round(row: Row) -> int:
    found = number(row, "round")
    return 0 if found is None else int(found)


def _stage(folder: Path, row: Row) -> Stage:
    run = _inside(folder, row.get("run"))
    outputs, parents = row.get("outputs"), row.get("parents")
    detail = row.get("detail")
    return Stage(
        round=_round(row),
        name=plain(row.get("name", "stage")),
        status=plain(row.get("status", "")),
        seconds=number(row, "seconds"),
        detail=plain(detail) if detail else "",
        run=run,
        report=f"{run}/report.html" if run and (folder / run / "report.html").is_file() else "",
        made=tuple(
            (str(name), plain(value)[:HASH])
            for name, value in (outputs.items() if isinstance(outputs, dict) else ())
        ),
        parents=tuple(plain(parent) for parent in (parents if isinstance(parents, list) else ())),
    )


def _inside(folder: Path, run: Any) -> str:
    """A relative path that stays in the pipeline's run; "" for another."""
    if not isinstance(run, str) or not run:
        return ""
    path = PurePosixPath(run)
    return "" if path.is_absolute() or ".." in path.parts else run


def _table(folder: Path, rows: Sequence[Row], numbers: Sequence[int]) -> Table:
    header = (
        "round", "labels", "annotators", "agreement", "agreement so far",
        "win rate against the start", "against the round before", "promoted",
    )  # fmt: skip
    return Table(
        "Rounds; agreement is Krippendorff's alpha, intervals are of 95 %",
        header,
        tuple(_table_row(folder, rows, n) for n in numbers),
    )


def _table_row(folder: Path, rows: Sequence[Row], n: int) -> tuple[str, ...]:
    label, promote = _detail(rows, n, "label"), _detail(rows, n, "promote")
    evaluated = _detail(rows, n, "evaluate")
    alpha = number(label, "alpha")
    return (
        str(n),
        _text(label, "labels"),
        _text(label, "annotators"),
        "not measured" if alpha is None else number_text(alpha),
        agreement_words(_snapshot(folder / f"round-{n}" / "labels")) or "not measured",
        *(_rate_words(evaluated, key) for key in AGAINST),
        "not yet" if "promoted" not in promote else "yes" if promote["promoted"] is True else "no",
    )


def _snapshot(folder: Path) -> Row:
    try:
        content = json.loads((folder / "snapshot.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _detail(rows: Sequence[Row], n: int, name: str) -> Row:
    for row in rows:
        if _round(row) == n and row.get("name") == name and isinstance(row.get("detail"), dict):
            return dict(row["detail"])
    return {}


def _text(detail: Row, key: str) -> str:
    return number_text(detail[key]) if number(detail, key) is not None else "-"


def _rate(detail: Row, key: str) -> tuple[float, float, float] | None:
    """Rate, low and high. A record without both comparisons has those against the start."""
    part = detail.get(key)
    part = part if isinstance(part, dict) else detail if key == "against_start" else {}
    found = [number(part, name) for name in ("win_rate", "ci_low", "ci_high")]
    rate, low, high = found
    return None if rate is None or low is None or high is None else (rate, low, high)


def _rate_words(detail: Row, key: str) -> str:
    found = _rate(detail, key)
    return "-" if found is None else f"{found[0]:.1%} ({found[1]:.1%} to {found[2]:.1%})"


def _rates(rows: Sequence[Row], key: str, label: str) -> Rates:
    numbers = sorted({n for row in rows if (n := _round(row)) > 0})
    found = [(n, rate) for n in numbers if (rate := _rate(_detail(rows, n, "evaluate"), key))]
    return Rates(
        label=f"against {label}",
        rounds=tuple(n for n, _ in found),
        rate=tuple(rate[0] for _, rate in found),
        low=tuple(rate[1] for _, rate in found),
        high=tuple(rate[2] for _, rate in found),
    )


def _samples(folder: Path, numbers: Sequence[int]) -> list[ByRound]:
    """The first prompts that every evaluated round has completions for."""
    read: dict[int, Mapping[str, Sample]] = {}
    for n in numbers:
        try:
            samples = read_samples(folder / f"round-{n}" / "evaluation" / "samples.jsonl")
        except UserError:
            continue
        read[n] = {sample.prompt: sample for sample in reversed(samples)}
    if not read:
        return []
    first = min(read)
    prompts = reversed(list(read[first]))
    shared = [prompt for prompt in prompts if all(prompt in s for s in read.values())]
    return [
        ByRound(
            prompt,
            (
                ("before round 1" if first == 1 else f"before round {first}",
                 read[first][prompt].before, read[first][prompt].before_score),
                *((f"round {n}", s[prompt].after, s[prompt].after_score) for n, s in read.items()),
            ),
        )
        for prompt in shared[:SHOWN_PROMPTS]
    ]  # fmt: skip
