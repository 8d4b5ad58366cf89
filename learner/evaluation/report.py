"""``report.html`` and ``summary.json`` of a run, from the files in its directory and nothing else.

The page is one file without scripts or network, in light, dark and print. Text of models and users
is escaped wherever it stands, and characters that a browser would hide or obey are shown by their
code points.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.contracts.errors import UserError
from learner.evaluation import contest_panel, panels
from learner.evaluation.about import about, expected
from learner.evaluation.completions import of_training
from learner.evaluation.curves import curves
from learner.evaluation.evaluation_rows import evaluation_table, read_evaluations
from learner.evaluation.event_rows import described, event_counts, notable
from learner.evaluation.labels_panel import label_tables
from learner.evaluation.lines import window, with_evaluations
from learner.evaluation.page import plain, render
from learner.evaluation.reward_panel import reward_rows, slices
from learner.evaluation.rounds import read_rounds, stage_runs
from learner.evaluation.run_files import Row, RunFiles, number, write_atomic
from learner.evaluation.samples import Sample, choose, read_samples
from learner.evaluation.verdict import alarm_steps, alarms, verdict, warnings

MOST_EVENTS = 200


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` and ``summary.json`` into ``run_dir``; returns the path of the page.
    Those of a pipeline's stages are written, too, where they are not there yet.

    May be called while the run writes. A missing or damaged file is named in the section that
    needed it. Raises UserError when ``run_dir`` is not a directory.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(
            "is not a run directory", where=str(run_dir), fix="give a folder under runs/"
        )
    for stage in stage_runs(RunFiles(run_dir)):
        if not (stage / "report.html").exists():
            write_report(stage)
    context = _context(RunFiles(run_dir))
    write_atomic(
        run_dir / "summary.json",
        json.dumps(context["figures"], indent=2, allow_nan=False) + "\n",
    )
    page = run_dir / "report.html"
    write_atomic(page, render("report.html.j2", context))
    return page


def _context(files: RunFiles) -> dict[str, Any]:
    manifest = files.json_object("manifest.json")
    command = (manifest or {}).get("command")
    rows = files.metrics() or []
    events = files.json_lines("events.jsonl")
    evaluation = files.json_object("evaluation.json")
    reward_model = files.json_object("reward_model.json")
    stages = files.json_list("stages.json")
    samples = _samples(files)
    stats = panels.sample_stats(samples)
    length_r = panels.length_correlation(rows)
    config = files.text("config.toml")
    preferences = files.json_object("preferences.json")
    rounds = read_rounds(files)
    has_labels = (files.directory / "labels.json").exists()  # of what learnt from a snapshot only
    labels = files.json_object("labels.json") if has_labels else None
    name = files.directory.resolve().name
    figures = panels.summary(
        name, rows, evaluation or {}, reward_model or {}, stages or [], events or []
    )
    found = warnings(figures, stats, length_r, evaluation)
    during = read_evaluations(files)
    evaluated = with_evaluations(rows, during)
    files.missing = [n for n in files.missing if expected(n, command)]
    context = {
        "figures": figures,
        "command": command,
        "verdict": verdict(figures, manifest or {}, rows, events or [], evaluation),
        "about": about(manifest or {}, config),
        "alarms": alarms(events or []),
        "warnings": found,
        "manifest": manifest,
        "evaluation": evaluation,
        "pairs": _pairs(evaluation),
        **_contest(evaluation),
        "reward_model": reward_model,
        "reliability_chart": panels.reliability_panel(reward_model or {}),
        "reward_rows": reward_rows(reward_model or {}),
        "reward_slices": slices(reward_model or {}),
        "preferences": preferences,
        "labels": label_tables(labels or {}),
        "rounds": rounds,
        "rounds_chart": panels.rounds_chart(rounds.rates) if rounds else None,
        "stages": stages,
        "chosen": choose(samples, random_count=3, seed=0),
        "trained": of_training(files),
        "sample_count": len(samples),
        "stats": stats,
        "curves": curves(evaluated, marks := alarm_steps(events or [])),
        "marks": marks,
        "evaluations": evaluation_table(during),
        "smoothed": window(len(rows)),
        **_reward_charts(rows, evaluated, evaluation),
        "length_r": length_r,
        "timing": panels.table(rows, ("time/",)),
        "overlap": panels.table(rows, ("async/", "perf/", "weight_sync/", "workers/", "sampling/")),
        "rewards": panels.table(rows, ("rewards/", "monitor/")),
        **_events(events),
        "parents": _parents(manifest),
        "config": config,
        "missing": files.missing,
        "notes": files.notes,
    }
    context["sections"] = _sections(context)
    figures["verdict"] = context["verdict"]
    figures["alarms"] = context["alarms"]
    figures["warnings"] = found
    figures["missing"] = sorted(files.missing)
    figures["notes"] = {name: list(texts) for name, texts in sorted(files.notes.items())}
    return context


def _contest(evaluation: Row | None) -> dict[str, Any]:
    ranked = contest_panel.ranking_rows(evaluation)
    return {
        "ranking": ranked,
        "ranking_chart": contest_panel.ranking_chart(ranked),
        "ranked_pairs": contest_panel.pair_rows(evaluation),
        "categories": contest_panel.group_rows(evaluation, "categories"),
        "turns": contest_panel.group_rows(evaluation, "turns"),
        "judge_rows": contest_panel.judge_rows(evaluation),
    }


def _reward_charts(rows: list[Row], evaluated: list[Row], evaluation: Row | None) -> dict[str, Any]:
    return {
        "frontier_charts": panels.frontier_charts(evaluated, evaluation),
        "length_chart": panels.length_chart(rows),
    }


# Section -> (heading, what of the context it shows, files it needs).
SECTIONS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "headline": ("Result", ("figures",), ()),
    "rounds": ("Rounds", ("rounds",), ("pipeline.json",)),
    "curves": ("Curves", ("curves",), ("metrics.jsonl",)),
    "evaluations": ("Evaluation while training", ("evaluations",), ("evaluations.jsonl",)),
    "samples": ("Completions", ("chosen", "trained"), ("samples.jsonl", "rollouts")),
    "hacking": (
        "Reward hacking",
        ("frontier_charts", "length_chart", "stats", "rewards"),
        ("metrics.jsonl", "samples.jsonl"),
    ),
    "reward-model": (
        "Reward model",
        ("reward_model", "preferences"),
        ("reward_model.json", "preferences.json"),
    ),
    "labels": ("Labels", ("labels",), ("labels.json",)),
    "lineage": ("Lineage", ("manifest",), ("manifest.json",)),
    "timing": ("Timing", ("stages", "timing"), ("stages.json",)),
    "overlap": ("Speed, overlap and staleness", ("overlap",), ()),
    "events": ("Faults and events", ("event_counts",), ("events.jsonl",)),
    "config": ("Config", ("config",), ("config.toml",)),
}


def _sections(context: dict[str, Any]) -> dict[str, str]:
    """Id -> heading of the sections that have something to show or something amiss to name."""
    troubled = {*context["missing"], *context["notes"]}
    found = {
        key: heading
        for key, (heading, contents, needed) in SECTIONS.items()
        if any(context[name] for name in contents) or troubled & set(needed)
    }
    result = context["evaluation"] is not None or context["figures"]["win_rate"] is not None
    if context["rounds"] and not result:
        del found["headline"]  # of a pipeline, each round has a result of its own
    return found


def _samples(files: RunFiles) -> list[Sample]:
    path = files.directory / "samples.jsonl"
    if not path.exists():
        files.missing.append(path.name)
        return []
    try:
        return read_samples(path)
    except UserError as error:
        files.note(path.name, str(error))
        return []


def _events(events: list[Row] | None) -> dict[str, Any]:
    found = [event for event in events or [] if notable(event)]
    times = [at for event in events or [] if (at := number(event, "time")) is not None]
    start = min(times, default=0.0)
    return {
        "events": None if events is None else [described(e, start) for e in found[-MOST_EVENTS:]],
        "events_left_out": max(0, len(found) - MOST_EVENTS),
        "event_counts": event_counts(events or []),
    }


def _pairs(evaluation: Row | None) -> int | None:
    """``pairs`` may be their number or the pairs themselves; else wins + ties + losses."""
    if evaluation is None:
        return None
    pairs = evaluation.get("pairs")
    if isinstance(pairs, int):
        return pairs
    if isinstance(pairs, list):
        return len(pairs)
    counts = [evaluation.get(key) for key in ("wins", "ties", "losses")]
    return sum(c for c in counts if isinstance(c, int)) or None


def _parents(manifest: Row | None) -> list[tuple[str, str]]:
    parents = (manifest or {}).get("parents")
    if not isinstance(parents, dict):
        return []
    return [(str(role), plain(origin)) for role, origin in parents.items()]
