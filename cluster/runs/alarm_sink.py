"""Where alarms go: a line for the person at the console, and an event for the run's files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.contracts.config.alarms import AlarmsConfig
from cluster.runs.alarms import Watch
from cluster.runs.console import Reporter
from cluster.runs.run import Run


class AlarmSink:
    """A metrics sink. The steps already in ``metrics.jsonl`` are watched first, in silence, so that
    a resumed run neither forgets how it began nor repeats a warning."""

    def __init__(
        self,
        config: AlarmsConfig,
        run: Run,
        reporter: Reporter,
        *,
        samples_per_prompt: int,
        first: int = 0,
    ) -> None:
        """``first``: the step a run resumes at; rows after it are done again."""
        self._watch = Watch(config, samples_per_prompt=samples_per_prompt)
        self._run = run
        self._reporter = reporter
        for step, numbers in _steps_before(run.path / "metrics.jsonl", first):
            self._watch.check(step, numbers)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for change in self._watch.check(step, numbers):
            self._run.event("alarm", **asdict(change))
            word = "alarm" if change.change == "start" else "alarm over"
            self._reporter.say(f"{word} at step {step}: {change.text}")

    def close(self) -> None:
        """Nothing is held."""


def _steps_before(path: Path, first: int) -> Iterator[tuple[int, dict[str, float]]]:
    if not path.is_file():
        return
    by_step: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            by_step[int(row["step"])] = row
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a run that was killed may be half written
    for step in sorted(by_step):
        if step <= first:
            yield step, by_step[step]
