"""`accord samples`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.commands.options import Json, RunDirectory
from cluster.contracts.errors import UserError


def samples(
    run: RunDirectory,
    step: Annotated[
        int | None, typer.Option(min=1, help="Learner step. Default: the newest on disk.")
    ] = None,
    count: Annotated[
        int,
        typer.Option(
            min=1, help="Completions to show, in turn the best, the worst and a random one."
        ),
    ] = 6,
    as_json: Json = False,
) -> None:
    """Show completions of a run with their scores.

    The run may still be in progress. For a run of `accord evaluate` or `accord quickstart`, the
    command shows completions before and after training.

    Example: `accord samples runs/my-run --step 20 --count 3`
    """
    import json

    from cluster.contracts.samples import sampled_steps
    from cluster.runs.console import result
    from cluster.runs.run import Run

    path = Run.open(str(run)).path
    steps = sampled_steps(path)
    if steps:
        shown = _of_step(path, steps, step, count)
    elif (path / "samples.jsonl").is_file() and step is None:
        shown = _before_and_after(path, count)
    else:
        raise UserError(
            "holds no completions",
            where=str(path),
            fix="give a run of `accord train` with logging.save_rollouts = true, of `accord "
            "evaluate` or of `accord quickstart`",
        )
    lines, records = shown
    result(json.dumps(records, ensure_ascii=False) if as_json else "\n".join(lines))


Shown = tuple[list[str], list[dict[str, Any]]]


def _of_step(path: Path, steps: list[int], step: int | None, count: int) -> Shown:
    from dataclasses import asdict
    from statistics import fmean

    from cluster.contracts.samples import pick, read_samples
    from cluster.runs.sample_text import sample_lines

    chosen = step or steps[-1]
    if chosen not in steps:
        raise UserError(
            f"holds no completions of step {chosen}",
            where=str(path / "rollouts"),
            fix=f"choose from {steps[0]} to {steps[-1]}",
        )
    found = read_samples(path, chosen)
    picked = pick(found, count, seed=chosen)
    scores = [sample.score for sample in found if sample.score is not None]
    mean = f", mean score {fmean(scores):+.3f}" if scores else ""
    lines = [f"{path}: step {chosen}, {len(picked)} of {len(found)} completions{mean}"]
    for reason, sample in picked:
        lines += ["", *sample_lines(reason, sample)]
    return lines, [{"chosen": reason, **asdict(sample)} for reason, sample in picked]


def _before_and_after(path: Path, count: int) -> Shown:
    from dataclasses import asdict

    from learner.evaluation.samples import choose, read_samples

    found = read_samples(path / "samples.jsonl")
    picked = choose(found, random_count=count)[:count]
    lines = [f"{path}: {len(picked)} of {len(found)} prompts"]
    for chosen in picked:
        sample = chosen.sample
        lines += ["", f"{chosen.reason}:", "  prompt", *_indented(sample.prompt)]
        for name, text, score in (
            ("before", sample.before, sample.before_score),
            ("after", sample.after, sample.after_score),
        ):
            lines.append(f"  {name}" + ("" if score is None else f", score {score:+.3f}"))
            lines += _indented(text)
    stages = sorted(folder.parent for folder in path.glob("*/rollouts"))
    lines += ["", *(f"of its training: accord samples {stage}" for stage in stages)]
    return lines, [{"chosen": c.reason, **asdict(c.sample)} for c in picked]


def _indented(text: str) -> list[str]:
    return [f"    {line}".rstrip() for line in text.splitlines()]
