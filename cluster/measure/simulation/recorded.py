"""A scenario out of the files of a training run: what it took, to be simulated with other sizes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.contracts.config.file import read_toml
from cluster.contracts.errors import UserError
from cluster.measure.simulation.scenario import Scenario

STEPS = 120  # to be simulated
_FEWEST = 4


def read_run(path: Path) -> tuple[Scenario, float]:
    """(scenario, median seconds of its steps). The first steps, in which everything is still cold,
    are left out.

    Raises UserError when the directory is not that of a training run with enough steps.
    """
    rows, spans = _rows(path), _spans(path)
    config = read_toml(str(path / "config.toml"))
    batch, rollout = config["batch"], config["rollout"]
    bound, workers = int(config["staleness"]["bound"]), int(rollout["workers"])
    samples = int(batch["prompts_per_step"]) * int(batch["samples_per_prompt"])
    # No more answers than these can ever be decoded at once.
    slots = min(int(rollout["max_running"]), -(-(bound + 1) * samples // workers))
    busy = [workers * max(0.05, 1.0 - row["perf/rollout_idle_frac"]) for row in rows]
    rate = median(row["rollout/tokens_per_s"] / b for row, b in zip(rows, busy, strict=True))
    pause_s = median(row.get("weight_sync/pause_s", 0.0) for row in rows)
    broadcast_s = median(spans["weights"]) if spans["weights"] else pause_s
    lengths = _lengths(path)
    step_s = median(row["time/step"] for row in rows)
    scenario = Scenario(
        workers=workers,
        slots=slots,
        tokens_per_s=rate / slots,
        length_mean=median(row["completions/mean_length"] for row in rows),
        max_tokens=int(rollout["max_tokens"]),
        lengths=lengths,
        speed_cv=0.0,
        stragglers=0.0,
        churn_per_hour=0.0,
        prompts_per_step=int(batch["prompts_per_step"]),
        samples_per_prompt=int(batch["samples_per_prompt"]),
        bound=bound,
        learn_step_s=median(spans["learner"]),
        publish_s=0.0,  # within the learner's step
        fetch_s=max(0.0, broadcast_s - pause_s),
        pause_s=pause_s,
        score_s=0.0,
        seconds=STEPS * step_s,
    )
    return scenario, step_s


def _rows(path: Path) -> list[dict[str, Any]]:
    file = path / "metrics.jsonl"
    if not file.is_file():
        raise UserError(
            "there is no metrics.jsonl in it", where=str(path), fix="give a training run"
        )
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    needed = ("rollout/tokens_per_s", "perf/rollout_idle_frac", "time/step")
    rows = [row for row in rows if all(name in row for name in needed)]
    kept = rows[len(rows) // 4 :]
    if len(kept) < _FEWEST:
        raise UserError(
            f"has {len(rows)} learner steps with rollouts: too few to tell what they take",
            where=str(path),
            fix="give the directory of a longer training run (of a pipeline: RUN/round-1/policy)",
        )
    return kept


def _spans(path: Path) -> dict[str, list[float]]:
    """Seconds of the learner's steps and of the broadcasts, the first quarter left out."""
    file = path / "timeline.json"
    if not file.is_file():
        raise UserError(
            "there is no timeline.json in it: it is written when a run ends",
            where=str(path),
            fix="wait for its end",
        )
    events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    found: dict[str, list[float]] = {"learner": [], "weights": []}
    for event in events:
        row = event.get("cat")
        if row in found and re.match(r"step|version", event["name"]):
            found[row].append(event["dur"] / 1e6)
    if not found["learner"]:
        raise UserError("its timeline has no learner step", where=str(path))
    return {row: seconds[len(seconds) // 4 :] for row, seconds in found.items()}


def _lengths(path: Path) -> tuple[float, ...]:
    """Of every recorded answer; none when the run kept no rollouts."""
    found: list[float] = []
    for file in sorted((path / "rollouts").glob("step-*.parquet")):
        column = pq.read_table(file, columns=["token_ids"])["token_ids"]
        found += [float(n) for n in pc.list_value_length(column).to_pylist()]
    return tuple(found)
