"""`accord quickstart`: a pipeline of one round on the embedded help-desk task.

The task's data and a model with random weights are made here; everything after that is `accord
pipeline` with the config that lies in the run directory, and can be repeated by hand.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from cluster.assembly.judged_comparisons import result_line
from cluster.assembly.preferences import open_store, statistics
from cluster.contracts.durable import write_json
from cluster.pipeline.pipeline import begin_pipeline, resume_pipeline
from cluster.pipeline.record import FILE
from cluster.quickstart.settings import QuickstartConfig, pipeline_config
from cluster.runs.console import Reporter, result
from cluster.runs.run import Run, name_by_time

JUDGE_NOTE = (
    "gold is the task's own rule for a good completion. The simulated annotators imitate it with "
    "noise; training never saw it."
)
SETTINGS = "quickstart"  # of the run's manifest


def quickstart(
    directory: str, name: str, seed: int, scale: float, kl_coef: float | None, reporter: Reporter
) -> Path:
    """Run the whole loop; prints where the report is and how to talk to the result."""
    settings = QuickstartConfig.of(seed, scale, kl_coef)
    if not name:  # examples/ refer to the first one; later runs are named by their time
        first = not Path(directory, "quickstart").exists()
        name = "quickstart" if first else name_by_time("quickstart")
    run = begin_pipeline(
        pipeline_config(settings, directory, name),
        reporter,
        command="quickstart",
        prepare=lambda run: make_data(run, reporter),
        manifest={SETTINGS: settings.model_dump()},
    )
    return finish(run, reporter)


def resume_quickstart(path: str, overrides: list[str], reporter: Reporter) -> Path:
    """Go on with a quickstart that was stopped."""
    run = resume_pipeline(path, overrides, reporter, prepare=lambda run: make_data(run, reporter))
    return finish(run, reporter)


def make_data(run: Run, reporter: Reporter) -> None:
    """Demonstrations, prompts, a tokenizer and a model with random weights, unless they are there:
    the model comes last, and appears whole."""
    from cluster.quickstart.helpdesk import demonstrations, files, questions
    from learner.models.tiny import fresh_model, train_tokenizer

    base, data = run.path / "base", run.path / "data"
    if base.is_dir():
        return
    manifest = json.loads((run.path / "manifest.json").read_text(encoding="utf-8"))
    config = QuickstartConfig.model_validate(manifest[SETTINGS])
    with reporter.stage("making the task and a small model"):
        demos = demonstrations.sample_demonstrations(config.seed, config.demonstrations)
        files.write_sft(data / "demonstrations.jsonl", demos)
        wanted: dict[questions.Split, int] = {
            "preference": config.preference_prompts,
            "rl": config.rl_prompts,
            "eval": config.eval_prompts,
        }
        for split, count in wanted.items():
            rows = questions.sample_questions(config.seed, count, split)
            files.write_prompts(data / f"{split}_prompts.jsonl", rows)
        staging = run.path / ".base.part"
        shutil.rmtree(staging, ignore_errors=True)
        corpus = demonstrations.corpus(config.seed, 4000)
        tokenizer = train_tokenizer(corpus, 640, staging)
        fresh_model(
            tokenizer, staging, hidden=128, layers=4, heads=4, intermediate=384,
            arch="qwen2", seed=config.seed,
        )  # fmt: skip
        staging.rename(base)


def finish(run: Path, reporter: Reporter) -> Path:
    """The files that the report reads, the report, and the closing lines."""
    from learner.evaluation.report import write_report
    from reward_service.preferences.export import export_preferences

    first = run / "round-1"
    store = open_store(run / "preferences.db", must_exist=True)
    export_preferences(store, run / "data" / "pairs.jsonl")
    write_json(run / "preferences.json", statistics(store))
    record = json.loads((first / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    write_json(run / "evaluation.json", {**record, "judge_note": JUDGE_NOTE})
    for folder, names in (
        ("evaluation", ("samples.jsonl",)),
        ("reward_model", ("reward_model.json",)),
        ("policy", ("metrics.jsonl", "events.jsonl", "timeline.json")),
    ):
        for name in names:
            shutil.copy(first / folder / name, run / name)
    stages = [_shown(row) for row in json.loads((run / FILE).read_text("utf-8"))["stages"]]
    write_json(run / "stages.json", stages)
    reporter.say(result_line(record))
    reporter.say(f"whole loop: {sum(stage['seconds'] for stage in stages):.0f} s")
    result(f"report: {write_report(run)}")
    result(
        f"talk to it: accord chat {run} --no-history "  # it was trained on single questions
        f"--before {run / 'sft' / 'policy'}"
    )
    return run


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A stage as the report lists it."""
    plain = {k: v for k, v in row["detail"].items() if isinstance(v, str | int | float)}
    detail = {k: f"{v:.3f}" if isinstance(v, float) else str(v) for k, v in plain.items()}
    return {
        "name": row["name"].replace("_", " "),
        "seconds": row["seconds"],
        "detail": ", ".join(f"{key} {value}" for key, value in detail.items()),
        "parents": row["parents"],
    }
