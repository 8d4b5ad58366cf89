"""`accord status`: where one run stands, from its files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.contracts.errors import UserError
from cluster.runs.checkpoints import step_of
from cluster.runs.console import shown
from cluster.runs.control import Wishes, read_wishes
from cluster.runs.driver import driver_of
from cluster.runs.event_words import cores_text
from cluster.runs.history import FollowedHistory, History
from cluster.runs.overview import RunOverview, ago, fresh_live, heartbeat_age, overview, span
from cluster.runs.run import Run

CONTINUED = ("train", "sft", "reward-model", "dpo")  # the commands that have --resume


def read_status(run: Run, history: History | None = None) -> dict[str, Any]:
    """For people and --json. ``alarms``: those that have not ended; ``workers``: names of the
    rollout workers that serve now; ``driver_alive``: None where this machine cannot tell;
    ``live``: what live.json says, None where it is missing or old; ``heartbeat_age_s``: seconds
    since the driver wrote it; ``cores``: who runs on which, where the run has moved
    roles. ``history``: where it is at hand.

    Raises UserError for a damaged manifest.
    """
    facts = overview(run.path, sized=history is None)
    if facts.status == "damaged":
        raise UserError(
            "is damaged", where=str(run.path / "manifest.json"), fix="restore the file, if you can"
        )
    history = history or FollowedHistory(run.path).read()
    driver = driver_of(run.path)
    checkpoint = _newest_checkpoint(run)
    wishes = _wishes(run)
    running = facts.status == "running"
    live = fresh_live(run.path) if running else None
    return {
        **facts.record(),
        "metrics": dict(facts.metrics),
        "alarms": history.alarms,
        "workers": history.serving if running else [],
        "workers_wanted": wishes.worker_count,
        "paused": wishes.paused and running,
        "checkpoint": checkpoint and {"path": str(checkpoint), "step": step_of(checkpoint.name)},
        "cores": history.cores.get("cores") if running else None,
        "dashboard": history.cluster.get("dashboard") if running else None,
        "driver": driver.record() if driver else None,
        "driver_alive": driver.alive() if driver else None,
        "live": asdict(live) if live else None,
        "heartbeat_age_s": heartbeat_age(run.path) if running else None,
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
    if cores := cores_text(status["cores"]):
        lines.append(f"  {cores}")
    if status["checkpoint"]:
        path = Path(status["checkpoint"]["path"])
        lines.append(f"  newest checkpoint: {path} ({ago(path.stat().st_mtime)})")
    lines += live_lines(status["live"], status["heartbeat_age_s"])
    lines += address_lines(status)
    lines += [f"  alarm: {text}" for text in status["alarms"]]
    lines += _process(facts, status)
    events = ", ".join(f"{kind} {count}" for kind, count in sorted(status["events"].items()))
    return [*lines, f"  events: {events}"] if events else lines


def live_lines(live: dict[str, Any] | None, heartbeat_age_s: float | None) -> list[str]:
    """What the run waits for and what would help. The numbers of a file are taken as they come: it
    may be another release's."""
    if live is None:
        if heartbeat_age_s is None:
            return []
        return [f"  the run's process has not reported for {span(heartbeat_age_s)}"]
    stage, learner = live["bottleneck"], live["learner"]
    lines = [
        f"  generated {number_text(live['tokens_per_s'])} tokens/s, learner {learner['state']} for "
        f"{number_text(learner['state_s'])} s, {number_text(live['queue']['ready'])} of "
        f"{number_text(live['queue']['per_step'])} groups ready, "
        f"staleness {number_text(live['staleness']['mean'])}"
    ]
    if stage["stage"]:
        lines.append(f"  waits for: {stage['stage']}. {stage['why']}".rstrip())
        lines += [f"  advice: {stage['advice']}"] if stage["advice"] else []
    silent = [str(worker["name"]) for worker in live["workers"] if worker["silent"]]
    silent += ["the learner"] if learner["silent"] else []
    return [*lines, f"  does not answer: {', '.join(silent)}"] if silent else lines


def address_lines(status: dict[str, Any]) -> list[str]:
    if not status["dashboard"]:
        return []
    lines = [
        f"  Ray dashboard: http://{status['dashboard']} (`ray get-auth-token` prints the token it "
        "asks for)"
    ]
    page = (status["live"] or {}).get("addresses", {}).get("page")
    return [*lines, f"  this run's page, with its token: {page}"] if page else lines


def number_text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "?"
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2g}"


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
    return [*lines, f"  continue: accord {facts.command} --resume {facts.path}"]


def _wishes(run: Run) -> Wishes:
    try:
        return read_wishes(run.path)
    except ValueError:  # the run itself ignores the file, and says so in its events
        return Wishes()


def _newest_checkpoint(run: Run) -> Path | None:
    found = run.checkpoints.complete()
    return found[-1] if found else None
