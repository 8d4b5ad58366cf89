"""Which evaluation is the best so far, and when there were too many without a better one. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cluster.contracts.config.evaluation import EvaluationConfig
from cluster.runs.evaluations import Evaluation


@dataclass(slots=True)
class BestSoFar:
    """``step``: of the best evaluation, ``value``: its metric; None before the first. ``since``:
    evaluations after it that were no better. The start counts as neither: it is no result of
    training, and what an evaluation without scores would have shown nobody knows."""

    config: EvaluationConfig
    step: int | None = None
    value: float | None = None
    since: int = 0

    @classmethod
    def of(cls, config: EvaluationConfig, rows: Iterable[Evaluation]) -> BestSoFar:
        """Where the rows of a run, ascending by step, have led to."""
        found = cls(config)
        for row in rows:
            found.add(row)
        return found

    def metric_of(self, row: Evaluation) -> float | None:
        return row.win_rate if self.config.metric == "win_rate" else row.score

    def improves(self, row: Evaluation) -> bool:
        value = self.metric_of(row)
        if row.step == 0 or value is None:
            return False
        return self.value is None or value > self.value + self.config.min_improvement

    def add(self, row: Evaluation) -> None:
        """``row.best`` says whether it became the best: its checkpoint has to be there, too."""
        value = self.metric_of(row)
        if row.step == 0 or value is None:
            return
        if row.best:
            self.step, self.value, self.since = row.step, value, 0
        else:
            self.since += 1

    @property
    def hopeless(self) -> bool:
        """Whether the patience of the config is at its end."""
        return 0 < self.config.patience <= self.since
