"""Where alarms go: a line for the person at the console, an event for the run's files, and what the
monitor's action does."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cluster.contracts.config.monitors import MonitorsConfig
from cluster.runs.console import Reporter
from cluster.runs.monitor_actions import MonitorActions
from cluster.runs.monitors import Watch
from cluster.runs.run import Run


class MonitorSink:
    """A metrics sink. The steps already in ``metrics.jsonl`` are watched first, in silence, so that
    a resumed run neither forgets how it began nor repeats a warning."""

    def __init__(
        self,
        config: MonitorsConfig,
        run: Run,
        reporter: Reporter,
        actions: MonitorActions,
        *,
        samples_per_prompt: int,
        first: int = 0,
        rollbacks: Collection[int] = (),
    ) -> None:
        """``first``: the step a run resumes at; rows after it are done again. ``rollbacks``: the
        steps at which the run has gone back to a checkpoint."""
        self._watch = Watch(config, samples_per_prompt=samples_per_prompt)
        self._run = run
        self._reporter = reporter
        self._actions = actions
        left = sorted(rollbacks)
        for step, numbers in _steps_before(run.path / "metrics.jsonl", first):
            while left and left[0] < step:
                self._watch.begin_anew()
                left.pop(0)
            changes = self._watch.check(step, numbers)
            if step == first and not left:
                actions.act_once_more(changes, numbers)
        if left:
            self._watch.begin_anew()

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        changes = self._watch.check(step, numbers)
        done = self._actions.act(changes, numbers)
        for change in changes:
            if change.change == "again" and change.alarm not in done:
                continue
            if change.alarm in done:
                change = replace(change, text=f"{change.text} {done[change.alarm]}")
            self._run.event("alarm", **asdict(change))
            word = "alarm over" if change.change == "end" else "alarm"
            self._reporter.say(f"{word} at step {step}: {change.text}")

    def gone_back(self, step: int) -> None:
        """The run goes on from an earlier checkpoint, as of ``step``: no alarm is on."""
        for name in self._watch.active:
            text = f"{name} is over: the run went back."
            self._run.event("alarm", alarm=name, change="end", step=step, text=text)
        self._watch.begin_anew()

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
