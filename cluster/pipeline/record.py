"""What a pipeline has done: `pipeline.json` in its run directory, written after each change.

A finished stage is known by its record, and by the hashes of what it made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from cluster.contracts.durable import write_json
from cluster.contracts.errors import UserError
from cluster.runs.artefacts import artefact_hash

FILE = "pipeline.json"
StageName = Literal[
    "sft", "sample", "label", "gate", "reward_model", "policy", "evaluate", "promote"
]
Status = Literal["running", "waiting", "finished", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """``round``: 0 before the first one. ``run``: the run that the stage made, relative to the
    pipeline's, as are ``outputs`` (path -> hash) and those ``parents`` that lie in it.
    ``seconds``: of all attempts."""

    round: int
    name: StageName
    status: Status
    run: str | None = None
    seconds: float = 0.0
    detail: Mapping[str, Any] = field(default_factory=dict)
    parents: tuple[str, ...] = ()
    outputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"round {self.round}, {self.name}" if self.round else self.name


class PipelineRecord:
    """The stages of a pipeline in the order in which they began. Raises UserError for a file that
    is damaged."""

    def __init__(self, folder: Path, rounds: int) -> None:
        self.folder = folder
        self._rounds = rounds
        self._stages: dict[tuple[int, str], StageRecord] = {}
        if (folder / FILE).is_file():
            self._stages = _read(folder / FILE)

    def stages(self) -> list[StageRecord]:
        return list(self._stages.values())

    def find(self, round: int, name: StageName) -> StageRecord | None:
        return self._stages.get((round, name))

    def put(self, stage: StageRecord) -> None:
        self._stages[stage.round, stage.name] = stage
        rows = [asdict(one) for one in self._stages.values()]
        write_json(self.folder / FILE, {"rounds": self._rounds, "stages": rows})

    def hashes(self, paths: tuple[str, ...]) -> dict[str, str]:
        return {path: artefact_hash(self.folder / path) for path in paths}

    def require_unchanged(self) -> None:
        """Raise UserError where something that a finished stage made is not what it was. Of a path
        that several stages wrote, the last one counts."""
        made = {
            path: (stage, sha256)
            for stage in self._stages.values()
            if stage.status == "finished"
            for path, sha256 in stage.outputs.items()
        }
        for path, (stage, sha256) in made.items():
            place = self.folder / path
            if not place.exists() or artefact_hash(place) != sha256:
                what = "has changed since" if place.exists() else "is gone;"
                raise UserError(
                    f"{what} {stage.title} made it",
                    where=str(place),
                    fix="put it back as it was, or begin a new pipeline",
                )


def _read(path: Path) -> dict[tuple[int, str], StageRecord]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["stages"]
        found = [StageRecord(**{**row, "parents": tuple(row["parents"])}) for row in rows]
        if all(one.name in get_args(StageName) for one in found):
            return {(one.round, one.name): one for one in found}
        problem: Exception | str = "unknown stage"
    except (ValueError, KeyError, TypeError) as found_wrong:
        problem = found_wrong
    raise UserError(
        f"is damaged: {problem}", where=str(path), fix="restore it, or begin a new pipeline"
    )
