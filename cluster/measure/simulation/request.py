"""`accord simulate`: a run of another size, by the real controller on virtual time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from cluster.contracts.errors import UserError
from cluster.measure.simulation.recorded import read_run
from cluster.measure.simulation.scenario import Scenario
from cluster.measure.simulation.simulate import Outcome, simulate
from cluster.measure.step_time import needed_bound
from cluster.runs.console import Reporter, result

LEARNER_SHARE = 0.9  # of the time that generating a step takes, where nothing else is said
_WHERE = "accord simulate"
_NUMBERS = {f.name: f.type for f in fields(Scenario) if f.name not in ("lengths", "workers")}


@dataclass(frozen=True, slots=True)
class Request:
    """base: as large as the first of ``workers``. measured_step_s: of the recorded run."""

    base: Scenario
    workers: tuple[int, ...]
    measured_step_s: float | None


def show_simulation(
    workers: str, words: Sequence[str], run: Path | None, as_json: bool, reporter: Reporter
) -> None:
    request = read_request(workers, words, run)
    outcomes = []
    for count in request.workers:
        reporter.say(f"{count} workers, {request.base.seconds:.0f} s ...")
        try:
            outcomes.append(simulate(request.base.with_workers(count)))
        except ValueError as problem:
            raise UserError(str(problem), where=_WHERE, fix="for example seconds=7200") from None
    if as_json:
        rows = [as_row(outcome, outcomes[0]) for outcome in outcomes]
        settings = {k: v for k, v in asdict(request.base).items() if k != "lengths"}
        result(json.dumps({"settings": settings, "outcomes": rows}))
        return
    for line in (*about(request), *table(outcomes)):
        result(line)


def read_request(workers: str, words: Sequence[str], run: Path | None) -> Request:
    """``words``: settings of the scenario as KEY=VALUE. Raises UserError for nonsense."""
    given = dict(_setting(word) for word in words)
    share = given.pop("learner_share", None)
    base, measured = read_run(run) if run is not None else (Scenario(), None)
    counts = _counts(workers) or (base.workers,)
    if run is None and "prompts_per_step" not in given:
        base = base.with_workers(counts[0])
    try:
        base = (
            replace(base, **given) if run is not None else replace(base, workers=counts[0], **given)
        )
    except ValueError as problem:
        raise UserError(str(problem), where=_WHERE) from None
    learner_given = any(name.startswith("learn_") for name in given) or run is not None
    if share is not None or not learner_given:
        base = base.with_learner_share(float(share or LEARNER_SHARE))
    return Request(base, counts, measured)


def _setting(word: str) -> tuple[str, Any]:
    name, sign, text = word.partition("=")
    if not sign or name not in (*_NUMBERS, "learner_share"):
        known = ", ".join((*_NUMBERS, "learner_share"))
        raise UserError(
            f"{word!r} is not one of its settings", where=_WHERE, fix=f"KEY=VALUE with {known}"
        )
    try:
        return name, int(text) if _NUMBERS.get(name) == "int" else float(text)
    except ValueError:
        raise UserError(f"{name} is not a number: {text!r}", where=_WHERE) from None


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(word) for word in text.split(",") if word.strip())
    except ValueError:
        counts = (0,)
    if any(count < 1 for count in counts):
        raise UserError(
            f"{text!r} are not numbers of workers", where=f"{_WHERE} --workers", fix="64,256,1024"
        )
    return counts


def about(request: Request) -> list[str]:
    base = request.base
    slots = base.workers * base.slots
    lines = [
        f"{base.workers} workers x {base.slots} slots, "
        f"{base.tokens_per_s:g} tokens/s per completion, "
        f"{base.samples_per_step} samples per step, staleness.bound {base.bound}, "
        f"{base.seconds:g} s simulated, the first quarter not counted",
        f"alone: generation {base.generate_s():.4g} s per step, learner {base.learn_s():.4g} s; "
        f"needed bound for the mean completion: {needed_bound(slots, base.samples_per_step)}",
    ]
    if request.measured_step_s is not None:
        lines.append(f"the recorded run took {request.measured_step_s:.4g} s per step (median)")
    return lines


def as_row(outcome: Outcome, first: Outcome) -> dict[str, Any]:
    """Numbers of one size; ``efficiency``: goodput a worker, relative to the first size."""
    figures, scenario = outcome.figures, outcome.scenario
    per_worker = figures.goodput / scenario.workers
    mean = scenario.prediction(longest=False)
    longest = scenario.prediction(longest=True)
    return {
        "workers": scenario.workers,
        **asdict(figures),
        "efficiency": per_worker / (first.figures.goodput / first.scenario.workers),
        "predicted_step_s": mean.step_s,
        "predicted_bottleneck": mean.bottleneck,
        "predicted_longest_s": longest.step_s,
        "predicted_longest_bottleneck": longest.bottleneck,
        "samples_generated": outcome.samples_generated,
        "workers_lost": outcome.losses,
        "cpu_s": outcome.cpu_s,
        "cpu_us_per_sample": 1e6 * outcome.cpu_s / outcome.samples_generated,
    }


_COLUMNS = (
    ("workers", "workers", "d"),
    ("step s", "step_s", ".4g"),
    ("model s", "predicted_step_s", ".4g"),
    ("longest s", "predicted_longest_s", ".4g"),
    ("gen busy", "generation_busy", ".3f"),
    ("learner", "learner_busy", ".3f"),
    ("tokens/s", "goodput", ".4g"),
    ("E(n)", "efficiency", ".3f"),
    ("waste", "waste", ".4f"),
    ("lag mean", "staleness_mean", ".2f"),
    ("p95", "staleness_p95", "d"),
    ("max", "staleness_max", "d"),
    ("violations", "violations", "d"),
    ("lost", "workers_lost", "d"),
    ("samples", "samples_generated", "d"),
    ("CPU s", "cpu_s", ".1f"),
)


def table(outcomes: Sequence[Outcome]) -> list[str]:
    rows = [as_row(outcome, outcomes[0]) for outcome in outcomes]
    cells = [[format(row[key], style) for _, key, style in _COLUMNS] for row in rows]
    lines = [[title for title, _, _ in _COLUMNS], *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    shown = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    total = sum(row["violations"] for row in rows)
    return [
        *shown,
        f"model: the step-time model with the mean answer; longest: with the longest of a step "
        f"({rows[-1]['predicted_longest_bottleneck']} decides). Violations of the bound: {total}",
    ]
