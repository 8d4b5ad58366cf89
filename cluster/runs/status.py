"""`accord status`: where one run stands, from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.contracts.errors import UserError
from cluster.runs.console import shown
from cluster.runs.control import Wishes, read_wishes
from cluster.runs.driver import driver_of
from cluster.runs.history import FollowedHistory
from cluster.runs.overview import RunOverview, ago, overview, span
from cluster.runs.run import Run

CONTINUED = ("train", "sft", "reward-model", "dpo")  # the commands that have --resume


def read_status(run: Run) -> dict[str, Any]:
    """For people and --json. ``alarms``: those that have not ended; ``workers``: names of the
    rollout workers that serve now; ``driver_alive``: None where this machine cannot tell.

    Raises UserError for a damaged manifest.
    """
    facts = overview(run.path)
    if facts.status == "damaged":
        raise UserError(
            "is damaged", where=str(run.path / "manifest.json"), fix="restore the file, if you can"
        )
    history = FollowedHistory(run.path).read()
    driver = driver_of(run.path)
    checkpoint = _newest_checkpoint(run)
    wishes = _wishes(run)
    return {
        **facts.record(),
        "metrics": dict(facts.metrics),
        "alarms": history.alarms,
        "workers": history.serving if facts.status == "running" else [],
        "workers_wanted": wishes.worker_count,
        "paused": wishes.paused and facts.status == "running",
        "checkpoint": checkpoint and {"path": str(checkpoint), "step": _step(checkpoint)},
        "dashboard": history.cluster.get("dashboard") if facts.status == "running" else None,
        "driver": driver.record() if driver else None,
        "driver_alive": driver.alive() if driver else None,
        "events": dict(history.counts),
    }


def headline(run: RunOverview) -> str:
    """quickstart: running (train), step 12 of 60, reward +0.148, 3 min left"""
    steps = f" of {run.steps}" if run.steps else ""
    parts = [f"{run.name}: {run.status} ({run.command})", f"step {run.step}{steps}"]
    parts += [text] if (text := run.latest_text()) else []
    if run.seconds_left is not None:
        parts.append(f"{span(run.seconds_left)} left")
    if run.status in ("running", "dead", "silent"):
        parts.append(f"last sign of life {ago(run.updated)}")
    return ", ".join(parts)


def status_lines(run: Run) -> list[str]:
    """The headline, then a line per fact."""
    status, facts = read_status(run), overview(run.path)
    lines = [headline(facts)]
    numbers = shown(facts.metrics)
    if numbers:
        lines.append(f"  {numbers}")
    if facts.status == "running" and facts.command == "train":
        names, wanted = status["workers"], status["workers_wanted"]
        lines.append(
            f"  workers serving: {len(names)}"
            + (f" of {wanted} wanted" if wanted is not None else "")
            + (f" ({', '.join(names)})" if names else "")
        )
        if status["paused"]:
            lines.append(f"  paused; to go on: accord resume {facts.path}")
    if status["checkpoint"]:
        path = Path(status["checkpoint"]["path"])
        lines.append(f"  newest checkpoint: {path} ({ago(path.stat().st_mtime)})")
    if status["dashboard"]:
        lines.append(f"  Ray dashboard: {status['dashboard']}")
    lines += [f"  alarm: {text}" for text in status["alarms"]]
    lines += _process(facts, status)
    events = ", ".join(f"{kind} {count}" for kind, count in sorted(status["events"].items()))
    return [*lines, f"  events: {events}"] if events else lines


def _process(facts: RunOverview, status: dict[str, Any]) -> list[str]:
    driver = status["driver"]
    if facts.status == "silent" and driver:
        return [
            f"  driven by process {driver['pid']} on {driver['host']}, which has written nothing "
            "for minutes: its host may be down"
        ]
    if facts.status == "running" and driver and status["driver_alive"] is None:
        return [f"  driven by process {driver['pid']} on {driver['host']}; not visible from here"]
    if facts.status == "running" and driver:
        return [f"  driven by process {driver['pid']}"]
    if facts.status not in ("dead", "interrupted", "stopped") or facts.command not in CONTINUED:
        return []
    lines = []
    if facts.status == "dead" and driver:
        lines.append(f"  process {driver['pid']} has ended without saying why")
    if status["checkpoint"] or facts.command != "train":
        lines.append(f"  continue: accord {facts.command} --resume {facts.path}")
    return lines


def _wishes(run: Run) -> Wishes:
    try:
        return read_wishes(run.path)
    except ValueError:  # the run itself ignores the file, and says so in its events
        return Wishes()


def _newest_checkpoint(run: Run) -> Path | None:
    found = sorted((run.path / "checkpoints").glob("step-*/manifest.json"))
    return found[-1].parent if found else None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
