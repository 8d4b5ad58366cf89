"""Rounds on the embedded task: does the gold win rate rise with each round?

    python benchmarks/rounds.py --seed 0

makes the help-desk task and the small model of `accord quickstart`, fine-tunes it, and goes round
with `accord pipeline`: completions of the newest policy, simulated annotators, DPO on the labels of
all rounds, and the gold judge on prompts that nothing else sees. Each round's policy is compared
with that of the start and with the one before the round. The same command goes on where it was
stopped. `--from RUN` takes the task and the fine-tuned policy of a quickstart.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", default="runs", help="folder of the run")
    parser.add_argument("--name", default="", help="default: rounds-SEED")
    parser.add_argument("--from", dest="origin", default="", help="a run of accord quickstart")
    parser.add_argument("--out", default="", help="JSON file for the table")
    parser.add_argument("settings", nargs="*", help="section.key=value, as of accord pipeline")
    given = parser.parse_args()
    run = pipeline(given)
    rows = table(run)
    for row in rows:
        print(shown(row))
    if given.out:
        text = json.dumps({"seed": given.seed, "rounds": rows}, indent=2) + "\n"
        Path(given.out).write_text(text, encoding="utf-8")


def pipeline(given: argparse.Namespace) -> Path:
    """Begin the pipeline, or go on with it."""
    from cluster.machine.environment import prepare_environment

    prepare_environment()
    from cluster.pipeline.pipeline import begin_pipeline, resume_pipeline
    from cluster.quickstart.quickstart import SETTINGS, make_data
    from cluster.quickstart.settings import QuickstartConfig
    from cluster.runs.console import Reporter
    from cluster.runs.run import Run

    name, reporter = given.name or f"rounds-{given.seed}", Reporter()

    def prepare(run: Run) -> None:
        if not given.origin:
            make_data(run, reporter)

    run = Path(given.dir, name)
    if (run / "manifest.json").is_file():
        return resume_pipeline(str(run), given.settings, reporter, prepare=prepare)
    settings = QuickstartConfig.of(given.seed, 1.0, None)
    return begin_pipeline(
        config_of(given, settings, name),
        reporter,
        prepare=prepare,
        manifest={SETTINGS: settings.model_dump()},
    )


def config_of(given: argparse.Namespace, settings: Any, name: str) -> Any:
    """The quickstart's config with three rounds, other prompts in each, and DPO: PPO reaches in one
    round what is left to gain on this task."""
    from cluster.contracts.config.file import apply_overrides, check_config
    from cluster.contracts.config.pipeline import PipelineConfig
    from cluster.quickstart.settings import pipeline_config

    origin = Path(given.origin) if given.origin else None
    task = origin or Path(given.dir, name)
    tree = pipeline_config(settings, str(task.parent), task.name).model_dump(exclude_unset=True)
    tree["run"] = {"dir": given.dir, "name": name, "seed": given.seed}
    tree["rounds"] = given.rounds
    tree["sample"]["prompts_per_round"] = PROMPTS
    del tree["reward_model"], tree["train"]
    tree["dpo"] = {
        "beta": 0.1,
        "kl_samples": 0,
        "fit": {"lr": 1e-4, "rows_per_step": 32, "tokens_per_microbatch": 2048, "max_tokens": 128},
        "logging": {"ray_metrics": False},
    }
    tree["promote"] = {"min_win_rate": 0.5}
    if origin is not None:
        del tree["sft"]
        tree["model"]["path"] = str(origin / "sft" / "policy")
    apply_overrides(PipelineConfig, tree, given.settings)
    return check_config(PipelineConfig, tree, where="benchmarks/rounds.py")


PROMPTS = 300  # of each round, with four pairs each


def table(run: Path) -> list[dict[str, Any]]:
    """One row per round: labels so far, both win rates, promoted or not, seconds."""
    stages = json.loads((run / "pipeline.json").read_text(encoding="utf-8"))["stages"]
    rows = []
    for number in sorted({stage["round"] for stage in stages} - {0}):
        own = {stage["name"]: stage for stage in stages if stage["round"] == number}
        labels = [s for s in stages if s["name"] == "label" and s["round"] <= number]
        rows.append(
            {
                "round": number,
                "labels": sum(stage["detail"]["labels"] for stage in labels),
                "against_start": own["evaluate"]["detail"]["against_start"],
                "against_before": own["evaluate"]["detail"]["against_before"],
                "promoted": own["promote"]["detail"]["promoted"],
                "seconds": {name: stage["seconds"] for name, stage in own.items()},
            }
        )
    return rows


def shown(row: dict[str, Any]) -> str:
    rates = [
        "{win_rate:.3f} ({ci_low:.3f} to {ci_high:.3f})".format(**row[name])
        for name in ("against_start", "against_before")
    ]
    promoted = "promoted" if row["promoted"] else "not promoted"
    return (
        f"round {row['round']}: {row['labels']} labels; gold win rate {rates[0]} against the "
        f"start, {rates[1]} against the policy before; {promoted}; "
        f"{sum(row['seconds'].values()):.0f} s"
    )


if __name__ == "__main__":
    main()
