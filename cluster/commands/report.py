"""`accord report`."""

from __future__ import annotations

from cluster.commands.options import RunDirectory, print_path


def report(run: RunDirectory) -> None:
    """Write a run's report.html, also while the run goes on.

    The command also writes summary.json. `accord train`, `accord evaluate` and `accord quickstart`
    write both when they end.

    Example: `accord report runs/my-run`
    """
    from cluster.runs.run import Run
    from learner.evaluation.report import write_report

    print_path(write_report(Run.open(str(run)).path))
