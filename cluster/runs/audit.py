"""Proves from a run's own files that every prompt is accounted for: `accord audit`.

The loop enters each finished step into ledger.jsonl: which groups it trained on, which it left out
and why, and where all other groups were at that moment. A line ``{"start": n}`` begins a session:
what earlier sessions did from step n on was lost with the process and is done again. Rollouts on
disk are the second witness: they say token by token what was trained.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.contracts.errors import UserError
from cluster.contracts.samples import sample_file, sampled_steps
from cluster.runs.rows import Follower, Row
from cluster.runs.run import LEDGER, Run

WHOLE_LEDGER = 4 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a run promised: its batch, its staleness bound and its number of steps."""

    prompts_per_step: int
    samples_per_prompt: int
    bound: int
    steps: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One trained completion as the rollouts on disk have it. ``spans``: (version, end)."""

    group: int
    sample: int
    tokens: int
    spans: Sequence[tuple[int, int]]
    score: float
    scorer: str


@dataclass(frozen=True, slots=True)
class Violation:
    rule: str
    what: str
    ids: tuple[int, ...] = ()  # of groups


@dataclass(slots=True)
class Audit:
    """The totals of a run (groups, unless said otherwise), and what breaks a rule."""

    steps: int = 0
    sessions: int = 0
    issued: int = 0
    trained: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    in_flight: int = 0
    samples: int = 0
    tokens: int = 0
    refused: int = 0  # results that came twice or too late
    redone: int = 0  # steps that were lost with a process and done again
    files: int = 0  # steps whose rollouts were checked token by token
    scorers: tuple[str, ...] = ()
    violations: list[Violation] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        found = [{"rule": v.rule, "what": v.what, "groups": list(v.ids)} for v in self.violations]
        names = ("steps", "sessions", "issued", "trained", "in_flight", "samples", "tokens")
        numbers = {name: getattr(self, name) for name in (*names, "refused", "redone", "files")}
        return {
            **numbers,
            "dropped": dict(self.dropped),
            "scorers": list(self.scorers),
            "violations": found,
        }

    def breaks(self, rule: str, what: str, ids: Iterable[int] = ()) -> None:
        self.violations.append(Violation(rule, what, tuple(ids)))


def lasting_steps(rows: Iterable[Row], audit: Audit) -> list[tuple[int, Row]]:
    """(session, row) of the steps whose result the run still has, in the order in which they were
    done. A step that a session does twice stands there twice."""
    kept: list[tuple[int, Row]] = []
    for row in rows:
        if "start" in row:
            audit.sessions += 1
            before = len(kept)
            kept = [(session, old) for session, old in kept if old["step"] < row["start"]]
            audit.redone += before - len(kept)
        elif "step" in row:
            kept.append((audit.sessions, row))
    return kept


def audit_steps(rows: Iterable[Row], rules: Rules, audit: Audit) -> dict[int, Row]:
    """Check the books against themselves; returns the lasting row of each step."""
    by_step: dict[int, Row] = {}
    for _, row in lasting_steps(rows, audit):
        step, trained = int(row["step"]), [int(group) for group in row["trained"]]
        if step in by_step:
            audit.breaks("none twice", f"step {step} was trained twice", trained)
            continue
        if step != len(by_step):
            audit.breaks("none lost", f"step {step} follows step {len(by_step) - 1}", trained)
        by_step[step] = row
        audit.steps += 1
        audit.trained += len(trained)
        audit.samples += row["samples"]
        audit.tokens += row["tokens"]
        audit.refused = row["refused"]
        audit.dropped.update(row["dropped"].values())
        _check_groups(step, trained, row, rules, audit)
        _check_balance(step, row, audit)
    return by_step


def _check_groups(step: int, trained: Sequence[int], row: Row, rules: Rules, audit: Audit) -> None:
    own = range(step * rules.prompts_per_step, (step + 1) * rules.prompts_per_step)
    counted = Counter([*trained, *map(int, row["dropped"])])
    twice = [group for group, times in counted.items() if times > 1]
    if twice:
        audit.breaks("none twice", f"step {step} has groups twice", twice)
    if missing := [group for group in own if group not in counted]:
        audit.breaks("none lost", f"step {step} lacks groups", missing)
    if foreign := [group for group in counted if group not in own]:
        audit.breaks("none twice", f"step {step} has groups of other steps", foreign)
    if row["samples"] != len(trained) * rules.samples_per_prompt:
        audit.breaks("none lost", f"step {step} has {row['samples']} completions", trained)
    if step - row["version_min"] > rules.bound or row["version_max"] > step:
        versions = f"{row['version_min']} to {row['version_max']}"
        audit.breaks("staleness", f"step {step} has tokens of versions {versions}", trained)


def _check_balance(step: int, row: Row, audit: Audit) -> None:
    """Issued = trained + dropped + ready + in flight, at the moment at which the step ended."""
    audit.issued = row["issued"]
    audit.in_flight = row["ready"] + row["in_flight"]
    known = audit.trained + audit.dropped.total() + audit.in_flight
    if known != row["issued"]:
        audit.breaks(
            "balance",
            f"after step {step}: {row['issued']} issued, but {audit.trained} trained + "
            f"{audit.dropped.total()} dropped + {audit.in_flight} in flight = {known}",
        )


def audit_samples(
    step: int, samples: Iterable[Sample], row: Row, rules: Rules, audit: Audit
) -> set[str]:
    """Check a step's rollouts against its row; returns the versions of scorers."""
    places: dict[int, set[int]] = {}
    scorers: set[str] = set()
    stale, unscored, torn = set(), set(), set()
    for one in samples:
        if one.sample in places.setdefault(one.group, set()):
            audit.breaks("none twice", f"step {step} has a completion twice", [one.group])
        places[one.group].add(one.sample)
        scorers.add(one.scorer)
        ends = [0, *(end for _, end in one.spans)]
        if ends != sorted(set(ends)) or ends[-1] != one.tokens:
            torn.add(one.group)
        if any(not 0 <= step - version <= rules.bound for version, _ in one.spans):
            stale.add(one.group)
        if not math.isfinite(one.score) or not one.scorer:
            unscored.add(one.group)
    short = [group for group, found in places.items() if len(found) != rules.samples_per_prompt]
    other = set(places) ^ set(map(int, row["trained"]))
    for rule, what, ids in (
        ("rollouts", "are not those that were trained", other),
        ("rollouts", "have another number of completions", short),
        ("staleness", "have a token outside of the bound", stale),
        ("versions", "have tokens of no version", torn),
        ("scores", "have a score that is not finite or of no scorer", unscored),
    ):
        if ids:
            audit.breaks(rule, f"groups of step {step} on disk {what}", sorted(ids))
    audit.files += 1
    return scorers


def audit_run(path: str) -> Audit:
    """Raises UserError for a run without books."""
    run = Run.open(path)
    if not (run.path / LEDGER).is_file():
        raise UserError(
            f"has no {LEDGER}: it did not train on-line, or before its first step, or an older "
            "Accord made it",
            where=path,
            fix="give a run directory of `accord train`",
        )
    manifest = json.loads((run.path / "manifest.json").read_text(encoding="utf-8"))
    rules, audit = _rules(run.path), Audit()
    rows = Follower(run.path / LEDGER, WHOLE_LEDGER).new_rows()
    by_step = audit_steps(rows, rules, audit)
    _audit_files(run.path, rows, by_step, rules, audit)
    _audit_checkpoints(run.path, by_step, audit)
    if manifest["status"] == "finished":
        if audit.in_flight:
            audit.breaks("balance", f"the run has finished with {audit.in_flight} groups in flight")
        if audit.steps != rules.steps:
            audit.breaks("none lost", f"the run has finished with {audit.steps} steps")
    return audit


def _rules(path: Path) -> Rules:
    from cluster.contracts.config.file import load_config
    from cluster.contracts.config.train import TrainConfig

    config = load_config(TrainConfig, str(path / "config.toml"))
    batch = config.batch
    return Rules(
        prompts_per_step=batch.prompts_per_step,
        samples_per_prompt=batch.samples_per_prompt,
        bound=config.staleness.bound,
        steps=batch.steps,
    )


def _audit_files(
    path: Path, rows: Sequence[Row], by_step: Mapping[int, Row], rules: Rules, audit: Audit
) -> None:
    """Within a session one scorer has scored all: it may change only between sessions."""
    sessions = {int(row["step"]): session for session, row in lasting_steps(rows, Audit())}
    scorers: dict[int, set[str]] = {}
    for number in sampled_steps(path):
        if (step := number - 1) in by_step:  # files are counted from 1 for people
            found = audit_samples(step, _samples(path, step), by_step[step], rules, audit)
            scorers.setdefault(sessions[step], set()).update(found)
    for session, versions in scorers.items():
        if len(versions) > 1:
            audit.breaks("scores", f"session {session} has scores of {sorted(versions)}")
    audit.scorers = tuple(sorted(set().union(*scorers.values()))) if scorers else ()


def _samples(path: Path, step: int) -> Iterable[Sample]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    names = ["group_id", "sample", "span_version", "span_end", "score", "scorer_version"]
    table = pq.read_table(sample_file(path, step + 1), columns=[*names, "token_ids"])
    lengths = pc.list_value_length(table["token_ids"]).to_pylist()  # no object for each token
    for row, tokens in zip(table.select(names).to_pylist(), lengths, strict=True):
        yield Sample(
            group=row["group_id"],
            sample=row["sample"],
            tokens=tokens,
            spans=list(zip(row["span_version"], row["span_end"], strict=True)),
            score=row["score"],
            scorer=row["scorer_version"],
        )


def _audit_checkpoints(path: Path, by_step: Mapping[int, Row], audit: Audit) -> None:
    """A checkpoint knows the same groups as left out as the books of the steps before it."""
    for file in sorted((path / "checkpoints").glob("step-*/run_state.json")):
        state = json.loads(file.read_text(encoding="utf-8"))
        left_out = {int(row["group"]) for row in state["dropped"]}
        booked = {
            int(group)
            for step, row in by_step.items()
            if step < state["step"]
            for group in row["dropped"]
        }
        if left_out != booked:
            where = file.parent.name
            audit.breaks("dropped", f"{where} and the books differ", left_out ^ booked)


def audit_lines(audit: Audit) -> list[str]:
    """For a person."""
    total = audit.dropped.total()
    lines = [
        f"{audit.issued} groups issued = {audit.trained} trained + {total} dropped "
        f"+ {audit.in_flight} in flight",
        f"{audit.steps} steps in {audit.sessions} sessions, {audit.redone} of them done again; "
        f"{audit.samples} completions, {audit.tokens} tokens",
        f"{audit.refused} results refused; rollouts of {audit.files} steps checked token by token",
    ]
    lines += [f"dropped, {count}: {reason}" for reason, count in audit.dropped.most_common()]
    if audit.scorers:
        lines.append(f"scored by {', '.join(audit.scorers)}")
    for found in audit.violations:
        ids = f" (groups {', '.join(map(str, found.ids))})" if found.ids else ""
        lines.append(f"VIOLATED, {found.rule}: {found.what}{ids}")
    return lines if audit.violations else [*lines, "every prompt is accounted for"]
