"""`accord audit`."""

from __future__ import annotations

import typer

from cluster.commands.options import Json, RunDirectory


def audit(run: RunDirectory, as_json: Json = False) -> None:
    """Prove from a run's files that every prompt is accounted for.

    Issued groups = trained + dropped by reason + in flight, none trained twice, every token's
    version within the staleness bound, every score finite and of one scorer a session; across all
    resumes. Exits with code 1 and names the groups where that is not so.

    Example: `accord audit runs/my-run`
    """
    import json

    from cluster.runs.audit import audit_lines, audit_run
    from cluster.runs.console import result

    found = audit_run(str(run))
    result(json.dumps(found.record()) if as_json else "\n".join(audit_lines(found)))
    if found.violations:
        raise typer.Exit(1)
