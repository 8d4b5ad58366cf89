"""Completions on the console while a run trains (``logging.samples_every``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cluster.contracts.config.base import LoggingConfig
from cluster.contracts.samples import pick, read_samples, sampled_steps
from cluster.runs.console import Reporter
from cluster.runs.sample_text import table_lines

SHOWN = 3  # the best, the worst, a random one


class SampleSink:
    """A metrics sink that shows some of the completions of every n-th step.

    The learner writes them beside its next step, so that a step's file is there one or two steps
    later; until then the step waits.
    """

    def __init__(self, config: LoggingConfig, run_dir: Path, reporter: Reporter) -> None:
        self._every = config.samples_every
        self._run_dir = run_dir
        self._reporter = reporter
        self._waiting: list[int] = []
        if not config.save_rollouts:
            self._every = 0
            reporter.say(
                "no completions will be shown while training, because logging.save_rollouts is off"
            )

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._every and step % self._every == 0:
            self._waiting.append(step)
        if self._waiting:
            self._show()

    def close(self) -> None:
        self._show()

    def _show(self) -> None:
        written = set(sampled_steps(self._run_dir)) if self._waiting else set()
        ready = [step for step in self._waiting if step in written]
        self._waiting = [step for step in self._waiting if step not in written]
        for step in ready:
            samples = read_samples(self._run_dir, step)
            picked = pick(samples, SHOWN, seed=step)
            more = f"in full: accord samples {self._run_dir} --step {step}"
            title = f"step {step}, {len(picked)} of {len(samples)} completions ({more})"
            self._reporter.say("\n".join([title, *table_lines(picked)]))
