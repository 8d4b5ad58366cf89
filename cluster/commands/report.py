"""`accord report`."""

from __future__ import annotations

from cluster.commands.options import RunDirectory, print_path


def report(run: RunDirectory) -> None:
    """Write report.html and summary.json from a run's files, also while the run goes on.

    Example: `accord report runs/my-run`
    """
    from cluster.runs.run import Run
    from learner.evaluation.report import write_report

    print_path(write_report(Run.open(str(run)).path))
