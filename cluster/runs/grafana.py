"""A Grafana dashboard for the gauges that ``RayMetricsSink`` sends through Ray to Prometheus.

Pure: the dashboard is a dict made from the table below. It is imported by hand, or put where Ray
keeps its own dashboards (``write_dashboard``), where Grafana's file provisioning picks it up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.contracts.durable import write_text

FILE_NAME = "accord_grafana_dashboard.json"
UID = "accordRlhf"
FIRST_ID = 2001  # over those of Ray's own panels, so that both can stand in one dashboard
WIDTH, HEIGHT, COLUMNS = 8, 8, 3
_METRIC = re.compile(r"ray_accord_\w+")


@dataclass(frozen=True, slots=True)
class Panel:
    """``metrics`` as in ``metrics.jsonl``; ``unit`` is Grafana's; ``help`` says how to read it."""

    title: str
    metrics: tuple[str, ...]
    unit: str
    help: str


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
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
    ids = iter(range(FIRST_ID, FIRST_ID + 10_000))
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
    targets = [
        {
            "refId": chr(ord("A") + at),
            "datasource": source,
            # A restarted driver is a new series for a while; a run has one value at a time.
            "expr": f'max by (run) ({exported_name(metric)}{{run=~"$run"}})',
            "legendFormat": f"{{{{run}}}} {metric}",
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


def write_dashboard(directory: Path) -> Path:
    """Write the dashboard into ``directory`` (made when it is not there); returns the file."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / FILE_NAME
    write_text(path, json.dumps(build_dashboard(), indent=2) + "\n")
    return path
