"""A Grafana dashboard for the gauges that ``RayMetricsSink`` sends through Ray to Prometheus.

Pure: the dashboard is a dict made from the table below. It is imported by hand, or put where Ray
keeps its own dashboards (``install``), where Grafana's file provisioning picks it up. ``install``
also appends its rows to Ray's default dashboard, which the Metrics tab of Ray's dashboard shows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.contracts.durable import write_text
from cluster.contracts.errors import UserError

FILE_NAME = "accord_grafana_dashboard.json"
UID = "accordRlhf"
FIRST_ID = 2001  # over those of Ray's own panels, so that both can stand in one dashboard
MOST_IDS = 10_000
RAYS_FILE = "default_grafana_dashboard.json"
OURS = "of Accord"  # marks a variable that we added to Ray's dashboard
WIDTH, HEIGHT, COLUMNS = 8, 8, 3
_METRIC = re.compile(r"ray_accord_\w+")


@dataclass(frozen=True, slots=True)
class Panel:
    """``metrics`` as in ``metrics.jsonl``, or ``live/NAME`` for a gauge of the live view; ``unit``
    is Grafana's; ``help`` says how to read it; ``by``: a line for each value of this label, too."""

    title: str
    metrics: tuple[str, ...]
    unit: str
    help: str
    by: str = ""


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Accord now",
        (
            Panel(
                "Throughput by worker",
                ("live/worker_tokens_per_s",),
                "none",
                "Generated tokens per second in the last ten seconds.",
                by="worker",
            ),
            Panel(
                "What the run waits for",
                ("live/wait_share",),
                "percentunit",
                "Shares of the last minute. The largest one is the bottleneck.",
                by="stage",
            ),
            Panel(
                "Workers by status",
                ("live/workers",),
                "none",
                "Starting, serving, draining; restarted and left since the start.",
                by="status",
            ),
            Panel(
                "Last sign of life of a worker",
                ("live/worker_heartbeat_age_s",),
                "s",
                "A worker that should have answered ten seconds ago is stopped or cut off.",
                by="worker",
            ),
            Panel(
                "Last sign of life of the learner",
                ("live/learner_heartbeat_age_s", "live/learner_state_s"),
                "s",
                "Since its process last answered; since it began to train, wait or save.",
            ),
            Panel(
                "Groups waiting for the learner",
                ("live/queue_ready", "live/queue_in_flight", "live/reward_waiting"),
                "none",
                "Finished groups, groups at the workers, and those of them that wait for scores.",
            ),
        ),
    ),
    (
        "Learning",
        (
            Panel(
                "Reward",
                ("objective/scores", "objective/rlhf_reward"),
                "none",
                "Mean score of the trained completions; the same after penalties and KL.",
            ),
            Panel(
                "Judge's score on held-out prompts",
                ("evaluation/score",),
                "none",
                "Mean score of the newest evaluation; absent where evaluation.every is 0.",
            ),
            Panel(
                "Win rate against the start",
                ("evaluation/win_rate", "evaluation/ci_low", "evaluation/ci_high"),
                "percentunit",
                "Share of held-out completions better than the policy's own of the start.",
            ),
            Panel(
                "KL to the reference",
                ("objective/kl",),
                "none",
                "Nats per completion. A steep rise with the reward is a sign of reward hacking.",
            ),
            Panel(
                "Policy entropy",
                ("policy/entropy",),
                "none",
                "Nats per token. Near 0, all completions of a prompt are the same.",
            ),
            Panel(
                "Clipped tokens",
                ("policy/clipfrac",),
                "percentunit",
                "Share of tokens whose probability moved past the clip range in one step.",
            ),
            Panel(
                "Completion length",
                ("completions/mean_length", "completions/max_length"),
                "none",
                "Tokens. Growth without better completions is a sign of reward hacking.",
            ),
            Panel(
                "Explained variance of the value network",
                ("value/explained_var",),
                "none",
                "1 is perfect; below 0 the value network is worse than a constant.",
            ),
        ),
    ),
    (
        "Speed",
        (
            Panel(
                "Throughput",
                ("perf/throughput", "rollout/tokens_per_s"),
                "none",
                "Tokens per second: trained, and generated.",
            ),
            Panel(
                "Step time",
                ("time/step", "time/wait_batch"),
                "s",
                "Whole learner step, and the part of it spent waiting for rollouts.",
            ),
            Panel(
                "Idle",
                ("perf/trainer_idle_frac", "perf/rollout_idle_frac"),
                "percentunit",
                "Share of time without work. The side with more is over-provisioned.",
            ),
        ),
    ),
    (
        "Asynchrony",
        (
            Panel(
                "Staleness",
                ("async/staleness_mean", "async/staleness_max"),
                "none",
                "Learner steps between sampling and training.",
            ),
            Panel(
                "Groups waiting and in flight",
                ("async/queue_depth", "async/in_flight"),
                "none",
                "Finished groups waiting for the learner, and groups being generated.",
            ),
            Panel(
                "Weight transfer",
                ("weight_sync/seconds", "weight_sync/pause_s"),
                "s",
                "From publishing to the last worker's report, and the longest pause of generation.",
            ),
        ),
    ),
    (
        "Workers",
        (
            Panel("Workers", ("workers/alive",), "none", "Rollout workers that serve."),
            Panel(
                "Workers joined, left, restarted",
                ("workers/joined", "workers/left", "workers/restarts"),
                "none",
                "Since the run began.",
            ),
            Panel(
                "Canary difference",
                ("weight_sync/canary_logp_diff",),
                "none",
                "Largest difference of log-probabilities between learner and engines after a swap.",
            ),
        ),
    ),
)


def exported_name(metric: str) -> str:
    """Prometheus name of a metric of ``metrics.jsonl``, as the sink and Ray make it."""
    return "ray_accord_" + metric.replace("/", "_").replace("-", "_")


def build_dashboard() -> dict[str, Any]:
    """The dashboard as Grafana's JSON model; a new dict each time."""
    panels: list[dict[str, Any]] = []
    ids = iter(range(FIRST_ID, FIRST_ID + MOST_IDS))
    y = 0
    for title, row in ROWS:
        place = {"x": 0, "y": y, "w": WIDTH * COLUMNS, "h": 1}
        panels.append(
            {"id": next(ids), "type": "row", "title": title, "gridPos": place, "panels": []}
        )
        for at, panel in enumerate(row):
            x, line = at % COLUMNS * WIDTH, at // COLUMNS
            where = {"x": x, "y": y + 1 + line * HEIGHT, "w": WIDTH, "h": HEIGHT}
            panels.append(_panel(next(ids), panel, where))
        y += 1 + -(-len(row) // COLUMNS) * HEIGHT
    return {
        "uid": UID,
        "title": "Accord",
        "tags": ["accord"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource(), _run()]},
        "panels": panels,
    }


def _panel(number: int, panel: Panel, where: dict[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    labels = f"run, {panel.by}" if panel.by else "run"
    shown = f"{{{{{panel.by}}}}}" if panel.by else ""
    targets = [
        {
            "refId": chr(ord("A") + at),
            "datasource": source,
            # A restarted driver is a new series for a while; a run has one value at a time.
            "expr": f'max by ({labels}) ({exported_name(metric)}{{run=~"$run"}})',
            "legendFormat": f"{{{{run}}}} {shown or metric}",
        }
        for at, metric in enumerate(panel.metrics)
    ]
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.help,
        "datasource": source,
        "gridPos": where,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": {"tooltip": {"mode": "multi"}, "legend": {"displayMode": "list"}},
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Source", "type": "datasource", "query": "prometheus"}


def _run() -> dict[str, Any]:
    query = f"label_values({exported_name('run/step')}, run)"
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": query,
        "definition": query,
        "refresh": 2,  # at each change of the time range: new runs appear
        "multi": True,
        "includeAll": True,
    }


def unknown_metrics(dashboard: dict[str, Any], known: Collection[str]) -> list[str]:
    """Exported names the dashboard asks for that no metric in ``known`` (``group/name``) gives."""
    exported = {exported_name(metric) for metric in known}
    queries = [target["expr"] for p in dashboard["panels"] for target in p.get("targets", [])]
    queries += [str(entry["query"]) for entry in dashboard["templating"]["list"]]
    asked = {name for query in queries for name in _METRIC.findall(query)}
    return sorted(asked - exported)


def with_our_rows(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Ray's default dashboard with our rows below its own; ours of before are replaced."""
    merged = without_our_rows(theirs)
    ours = build_dashboard()
    bottom = max((_bottom(panel) for panel in merged["panels"]), default=0)
    for panel in ours["panels"]:
        panel["gridPos"]["y"] += bottom
    merged["panels"] = [*merged["panels"], *ours["panels"]]
    variables = merged.setdefault("templating", {}).setdefault("list", [])
    known = {entry.get("name") for entry in variables}
    added = [entry for entry in ours["templating"]["list"] if entry["name"] not in known]
    variables += [entry | {"description": OURS} for entry in added]
    return merged


def without_our_rows(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Ray's default dashboard as Ray wrote it. A new dict."""
    rest = json.loads(json.dumps(theirs))
    rest["panels"] = [p for p in rest.get("panels", []) if not _is_ours(p)]
    templating = rest.get("templating", {})
    if "list" in templating:
        templating["list"] = [e for e in templating["list"] if e.get("description") != OURS]
    return dict(rest)


def _is_ours(panel: Mapping[str, Any]) -> bool:
    return FIRST_ID <= int(panel.get("id", 0)) < FIRST_ID + MOST_IDS


def _bottom(panel: Mapping[str, Any]) -> int:
    place = panel.get("gridPos", {})
    return int(place.get("y", 0)) + int(place.get("h", 0))


def install(directory: Path) -> list[Path]:
    """Add our rows to Ray's default dashboard in ``directory`` and our own dashboard beside it.
    Repeatable. Returns the files written. Raises UserError where Ray's file is not there."""
    path = _rays_file(directory)
    write_text(path, json.dumps(with_our_rows(_read(path)), indent=2) + "\n")
    return [path, write_dashboard(directory)]


def uninstall(directory: Path) -> list[Path]:
    """Undo ``install``. Returns the files changed."""
    path = _rays_file(directory)
    write_text(path, json.dumps(without_our_rows(_read(path)), indent=2) + "\n")
    own = directory / FILE_NAME
    if not own.is_file():
        return [path]
    own.unlink()
    return [path, own]


def _rays_file(directory: Path) -> Path:
    path = directory / RAYS_FILE
    if not path.is_file():
        raise UserError(
            f"there is no {RAYS_FILE}, which Ray's head writes when it starts",
            where=str(directory),
            fix="give the folder that RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR named for the head, "
            "or SESSION/metrics/grafana/dashboards in Ray's folder for temporary files",
        )
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("panels"), list):
            raise ValueError("it has no list of panels")
    except ValueError as problem:
        raise UserError(
            f"is not a dashboard of Grafana: {problem}",
            where=str(path),
            fix="restart Ray's head, which writes it anew",
        ) from None
    return found


def write_dashboard(directory: Path) -> Path:
    """Write the dashboard into ``directory`` (made when it is not there); returns the file."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / FILE_NAME
    write_text(path, json.dumps(build_dashboard(), indent=2) + "\n")
    return path
