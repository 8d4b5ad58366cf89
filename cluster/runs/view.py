"""A run directory, read: its numbers, completions and results, also while the run goes on."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.contracts.errors import UserError
from cluster.contracts.samples import SampleInfo, read_samples, sampled_steps
from cluster.runs.overview import status_of
from cluster.runs.run import Run


@dataclass(frozen=True, slots=True)
class RunView:
    """Properties read the files anew each time. Raises UserError for what the run does not have."""

    path: Path

    @classmethod
    def open(cls, path: str | Path) -> RunView:
        """Raises UserError where ``path`` is no run directory."""
        return cls(Run.open(str(path)).path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Command, status, versions of packages, seed, parents."""
        return self._json("manifest.json")

    @property
    def status(self) -> str:
        """running, finished, interrupted, failed, or dead: its process ended without a word."""
        return status_of(self.path, self.manifest)

    @property
    def config(self) -> Mapping[str, Any]:
        """All settings in force, as a tree."""
        return tomllib.loads((self.path / "config.toml").read_text(encoding="utf-8"))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A row per step: ``step``, ``time`` and every metric, ready for ``pandas.DataFrame``. A
        step done again after a resume counts once."""
        by_step = {row["step"]: row for row in self._rows("metrics.jsonl")}
        return [by_step[step] for step in sorted(by_step)]

    @property
    def events(self) -> list[dict[str, Any]]:
        return list(self._rows("events.jsonl"))

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """The alarms that began, in order: ``alarm``, ``step``, ``value``, ``limit``, ``text``."""
        return [e for e in self.events if e["kind"] == "alarm" and e["change"] == "start"]

    @property
    def policy_path(self) -> Path:
        """The trained model's directory."""
        return self._there("policy", "the policy is written when the run ends")

    @property
    def reward_model_path(self) -> Path:
        return self._there("reward_model", "give a run of accord.reward_model")

    @property
    def report_path(self) -> Path:
        return self._there("report.html", "write it with `accord report`")

    @property
    def evaluation(self) -> Mapping[str, Any]:
        """Win rate, its interval, wins, ties, losses and mean scores of an evaluation."""
        return self._json("evaluation.json")

    @property
    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first; each has a ``policy/`` (of on-line training)."""
        return Run(self.path).checkpoints.complete()

    @property
    def sampled_steps(self) -> list[int]:
        """Steps whose completions are on disk, from 1."""
        return sampled_steps(self.path)

    def samples(self, step: int | None = None) -> list[SampleInfo]:
        """Prompts, completions and scores of a learner step, by default of the last one on disk."""
        if step is None:
            step = max(sampled_steps(self.path), default=1)
        return read_samples(self.path, step)

    def _there(self, name: str, fix: str) -> Path:
        path = self.path / name
        if not path.exists():
            raise UserError(f"has no {name}", where=str(self.path), fix=fix)
        return path

    def _json(self, name: str) -> Mapping[str, Any]:
        path = self._there(name, "give the directory of a run that writes it")
        content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content

    def _rows(self, name: str) -> Iterator[dict[str, Any]]:
        path = self.path / name
        for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
            try:
                yield json.loads(line)
            except ValueError:
                continue  # empty, or the line that a run is writing just now
