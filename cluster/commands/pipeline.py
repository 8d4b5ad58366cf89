"""`accord pipeline`."""

from __future__ import annotations

from cluster.commands.options import (
    OptionalConfig,
    Overrides,
    Quiet,
    Resume,
    load,
    reporter,
    resume_overrides,
)


def pipeline(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    resume: Resume = None,
    quiet: Quiet = False,
) -> None:
    """Go round: sample, label, train, evaluate, promote, and again.

    A round samples completions of the newest policy, has pairs of them judged (by people in a
    browser, by a function, or by an AI judge), checks the judgements, trains, and measures the new
    policy against the one before. Every stage is the work of its own command, in a folder of the
    run. A pipeline that was stopped goes on where it was.

    Example: `accord pipeline examples/pipeline.toml rounds=3`

    Example: `accord pipeline --resume runs/my-rounds`
    """
    if resume is not None:
        go_on(str(resume), resume_overrides(config, overrides), quiet)
        return
    from cluster.contracts.config.pipeline import PipelineConfig
    from cluster.pipeline.pipeline import Afresh, begin_pipeline

    settings = load(PipelineConfig, config, overrides, "pipeline")
    try:
        _tell(begin_pipeline(settings, reporter(quiet)))
    except Afresh as waits:
        in_a_new_process(waits.path, quiet)


def go_on(run: str, overrides: list[str], quiet: bool) -> None:
    """`accord pipeline --resume RUN`, also of a quickstart."""
    from cluster.assembly.run_session import made_by
    from cluster.pipeline.pipeline import Afresh, open_pipeline, resume_pipeline

    try:
        if made_by(open_pipeline(run)) == "quickstart":
            from cluster.quickstart.quickstart import resume_quickstart

            resume_quickstart(run, overrides, reporter(quiet))
        else:
            _tell(resume_pipeline(run, overrides, reporter(quiet)))
    except Afresh as waits:
        in_a_new_process(waits.path, quiet)


def in_a_new_process(run: str, quiet: bool) -> None:
    """This process ends, and its memory is free; the new one has its number and its terminal."""
    import os
    import sys

    sys.stdout.flush()
    sys.stderr.flush()
    words = ["pipeline", "--resume", run, *(["--quiet"] if quiet else [])]
    os.execv(sys.executable, [sys.executable, sys.argv[0], *words])


def _tell(run: object) -> None:
    from pathlib import Path

    from cluster.pipeline.pipeline import closing_lines
    from cluster.runs.console import result
    from learner.evaluation.report import write_report

    result(f"report: {write_report(Path(str(run)))}")
    for line in closing_lines(Path(str(run))):
        result(line)
