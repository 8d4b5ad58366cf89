"""What a run's evaluations while it trains found: ``evaluations.jsonl``, one row each, and
``best.json``, which names the checkpoint of the best one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cluster.contracts.durable import write_json, write_text
from cluster.runs.lines import Lines
from cluster.runs.rows import Row, whole_rows

EVALUATIONS = "evaluations.jsonl"
BEST = "best.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One evaluation of the policy after ``step`` learner steps.

    ``version_min``, ``version_max``: of the policy that sampled the tokens; with a staleness bound
    over 0 workers may take newer weights meanwhile. ``score``: mean of the judge's.
    ``judge_was_reward``: the judge is what the policy is trained on. ``win_rate``: against the
    completions of the start, ties count half, with its 95 % interval; None without a baseline.
    ``kl``: nats per completion, as the learner measured it in the step that made this policy.
    ``length``: mean tokens of a completion. ``seconds``: from its beginning to its scores.
    ``repeated``: parts that had to be sampled again, because a worker was lost or late.
    ``problem``: why there are no scores.
    """

    step: int
    judge: str
    judge_was_reward: bool
    version_min: int | None = None
    version_max: int | None = None
    prompts: int = 0
    completions: int = 0
    score: float | None = None
    win_rate: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    kl: float | None = None
    length: float | None = None
    best: bool = False
    seconds: float = 0.0
    repeated: int = 0
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Best:
    """``checkpoint``: its folder, relative to the run directory. ``score``: what it was chosen by,
    the mean score or the win rate."""

    step: int
    checkpoint: str
    score: float


def evaluations_of(run_dir: Path) -> list[Evaluation]:
    """By step, ascending. What is no whole row is passed over."""
    try:
        text = (run_dir / EVALUATIONS).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = [row for line in whole_rows(text) if (row := _evaluation(line)) is not None]
    return sorted({row.step: row for row in found}.values(), key=lambda row: row.step)


def _evaluation(row: Row) -> Evaluation | None:
    known = {field.name for field in fields(Evaluation)}
    try:
        return Evaluation(**{name: value for name, value in row.items() if name in known})
    except TypeError:
        return None


def best_of(run_dir: Path) -> Best | None:
    """What best.json names; None without one."""
    try:
        row: dict[str, Any] = json.loads((run_dir / BEST).read_text(encoding="utf-8"))
        return Best(int(row["step"]), str(row["checkpoint"]), float(row["score"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


class EvaluationFiles:
    """Writes them. ``samples``: where the completions of an evaluation are kept."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._lines = Lines(run_dir / EVALUATIONS)

    def rows_until(self, step: int) -> list[Evaluation]:
        """Of a run that goes on at ``step``. Later ones, of steps that will be done anew, are
        removed, and best.json with them where it names one."""
        rows = evaluations_of(self._run_dir)
        kept = [row for row in rows if row.step <= step]
        if len(kept) < len(rows):
            text = "".join(_line(row) + "\n" for row in kept)
            write_text(self._run_dir / EVALUATIONS, text)
        best = best_of(self._run_dir)
        if best is not None and best.step > step:
            self._name_earlier(kept)
        return kept

    def _name_earlier(self, kept: Sequence[Evaluation]) -> None:
        (self._run_dir / BEST).unlink()
        for row in reversed(kept):  # that of an earlier best may be there still
            place = self._run_dir / _checkpoint(row.step)
            if row.best and row.score is not None and place.is_dir():
                self.name_best(row.step, row.score)
                return

    def add(self, row: Evaluation) -> None:
        self._lines.add(_line(row))

    def name_best(self, step: int, score: float) -> bool:
        """Have best.json name the checkpoint of ``step``. False where that cannot be: the
        checkpoint is not there, or the disk is full."""
        if not (self._run_dir / _checkpoint(step)).is_dir():
            return False
        row = {"step": step, "checkpoint": _checkpoint(step), "score": score}
        with contextlib.suppress(OSError):
            write_json(self._run_dir / BEST, row)
            return True
        return False


def samples_file(run_dir: Path, step: int) -> Path:
    """Completions of the evaluation at ``step``, with their scores: one JSON object a line."""
    return run_dir / "evaluations" / f"step-{step:06d}.jsonl"


def _checkpoint(step: int) -> str:
    return f"checkpoints/step-{step:06d}"


def _line(row: Evaluation) -> str:
    return json.dumps(asdict(row), ensure_ascii=False)
