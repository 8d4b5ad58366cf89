"""The order of a pipeline's stages, and the loop that does those which are not done yet. What a
stage does is behind a protocol; nothing here knows of models, Ray or people."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from cluster.contracts.config.pipeline import PipelineConfig
from cluster.contracts.errors import UserError
from cluster.pipeline.record import PipelineRecord, StageName, StageRecord

PROMOTED = "promoted"
STORE = "preferences.db"  # of all rounds


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """``start``: the policy before the first round. ``before``: the newest promoted one, from which
    this round goes on. ``folder``: of the round, within the run's. Round 0 is what comes before."""

    number: int
    folder: Path
    start: str
    before: str
    record: PipelineRecord

    @property
    def policy(self) -> Path:
        """What this round trains."""
        return self.folder / "policy" / "policy"

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    def named(self, path: Path | str) -> str:
        """As `pipeline.json` names it: relative to the run where it lies in there."""
        run = self.record.folder
        place = Path(path)
        inside = place.is_relative_to(run)
        return place.relative_to(run).as_posix() if inside else str(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of a stage that is finished. ``made``: files and folders that do not change from now on.
    ``came_from``: what it was made of."""

    made: tuple[Path, ...] = ()
    came_from: tuple[Path | str, ...] = ()
    run: Path | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


Waiting = Callable[[Mapping[str, Any]], None]
"""Told, again and again, what a stage that waits for people is waiting for."""


class Stages(Protocol):
    def do(self, name: StageName, at: Round, waiting: Waiting) -> Outcome:
        """Do a stage from its beginning, or go on with what an earlier attempt has left. What an
        attempt left and cannot be used is removed first."""


def steps_of(config: PipelineConfig) -> Iterator[tuple[int, StageName]]:
    """(round, stage), in order."""
    if config.sft is not None:
        yield 0, "sft"
    for number in range(1, config.rounds + 1):
        yield number, "sample"
        yield number, "label"
        yield number, "gate"
        if config.reward_model is not None:
            yield number, "reward_model"
        yield number, "policy"
        if config.evaluate is not None:
            yield number, "evaluate"
        yield number, "promote"


def go_round(config: PipelineConfig, record: PipelineRecord, stages: Stages) -> None:
    """Do every stage that is not finished. Raises what a stage raises, after writing it down, and
    UserError where something that a finished stage made has changed."""
    record.require_unchanged()
    for number, name in steps_of(config):
        known = record.find(number, name)
        if not _is_done(known, record):
            _do(known or StageRecord(round=number, name=name, status="running"), record, stages,
                round_of(number, config, record))  # fmt: skip


def _is_done(known: StageRecord | None, record: PipelineRecord) -> bool:
    """Labels are done with their gate: while it does not pass, more of them can be asked for."""
    if known is None or known.status != "finished":
        return False
    gate = record.find(known.round, "gate")
    return known.name != "label" or (gate is not None and gate.status == "finished")


def round_of(number: int, config: PipelineConfig, record: PipelineRecord) -> Round:
    """With the policies that the records of earlier rounds lead to."""
    start = config.model.path
    if config.sft is not None and number > 0:
        start = str(record.folder / "sft" / "policy")
    return Round(
        number=number,
        folder=record.folder / f"round-{number}" if number else record.folder,
        start=start,
        before=str(newest_promoted(record, below=number) or start),
        record=record,
    )


def newest_promoted(record: PipelineRecord, *, below: int | None = None) -> Path | None:
    """The policy of the last round (``below`` this one) that was promoted."""
    promoted = [
        stage.round
        for stage in record.stages()
        if stage.name == "promote" and stage.status == "finished" and stage.detail.get(PROMOTED)
        if below is None or stage.round < below
    ]
    return record.folder / f"round-{max(promoted)}" / "policy" / "policy" if promoted else None


def _do(known: StageRecord, record: PipelineRecord, stages: Stages, at: Round) -> None:
    began = time.monotonic()

    def now(stage: StageRecord) -> None:
        record.put(replace(stage, seconds=round(known.seconds + time.monotonic() - began, 1)))

    running = replace(known, status="running")
    record.put(running)
    try:
        outcome = stages.do(
            known.name, at,
            lambda detail: now(replace(running, status="waiting", detail=dict(detail))),
        )  # fmt: skip
    except Exception as problem:
        cause = problem.what if isinstance(problem, UserError) else str(problem).split("\n")[0]
        left = record.find(known.round, known.name) or running
        now(replace(left, status="failed", detail={**left.detail, "cause": cause}))
        raise
    made = tuple(at.named(path) for path in outcome.made)
    now(
        replace(
            running,
            status="finished",
            run=None if outcome.run is None else at.named(outcome.run),
            detail=dict(outcome.detail),
            parents=tuple(at.named(path) for path in outcome.came_from),
            outputs=record.hashes(made),
        )
    )
