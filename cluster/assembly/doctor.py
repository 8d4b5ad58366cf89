"""`accord doctor`: the checks of this host and, on a joined cluster, of every host of it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.contracts.config.base import ClusterConfig
from cluster.contracts.config.file import check_config, read_toml
from cluster.contracts.errors import UserError
from cluster.machine.doctor import (
    CLOCK_S,
    Finding,
    State,
    check_dashboard_port,
    check_disk,
    check_reachable,
    check_token,
    check_tools,
    host_findings,
)
from cluster.machine.hardware import this_machine
from cluster.runs.console import result

ANSWER_S = 60.0


def examine(given: Path | None) -> list[Finding]:
    """``given``: a run directory or a config. Raises UserError for one that cannot be read."""
    tree = _tree(given)
    cluster = check_config(ClusterConfig, tree.get("cluster", {}), where=f"{given}: [cluster]")
    reward = tree.get("reward", {}).get("address")
    folder = given if given is not None and given.is_dir() else None
    place = folder or Path(str(tree.get("run", {}).get("dir", "runs"))).expanduser()
    found = host_findings(this_machine(), cluster.object_store_mb)
    if "://" not in str(place):  # an object store has no such disk; a run probes it by itself
        found += check_disk(place)
    found += [check_token(), check_dashboard_port(), *check_tools()]
    if isinstance(reward, str):
        found.append(check_reachable("reward.address", reward))
    if cluster.to_join is not None:
        found += _hosts(cluster)
    return found


def _tree(given: Path | None) -> Mapping[str, Any]:
    if given is None:
        return {}
    return read_toml(str(given / "config.toml" if given.is_dir() else given))


def _hosts(cluster: ClusterConfig) -> list[Finding]:
    """A line for each host of the cluster, its own checks in short."""
    from cluster.machine.nodes import on_every_node
    from cluster.machine.ray_session import ray_cluster

    try:
        with ray_cluster(cluster):
            asked = time.time()
            answers = on_every_node(_host_report, timeout_s=ANSWER_S)
            answered = time.time()
    except UserError as problem:
        return [Finding("cluster.address", "fail", problem.what, problem.fix or "")]
    return [_host(name, answer, asked, answered) for name, answer in answers.items()]


def _host_report() -> dict[str, Any]:
    """Runs on the host."""
    machine = this_machine()
    findings = host_findings(machine, 0)
    return {"machine": machine, "findings": findings, "time": time.time()}


def _host(name: str, answer: dict[str, Any] | Exception, asked: float, answered: float) -> Finding:
    """asked, answered: this host's clock, before and after the host was asked for its own."""
    if isinstance(answer, Exception):
        reason = (str(answer).strip() or type(answer).__name__).splitlines()[-1]
        return Finding(name, "fail", f"does not answer: {reason}", "`ray status` shows its state")
    machine, bad = answer["machine"], [f for f in answer["findings"] if f.state != "ok"]
    says = (
        f"{machine.cores} cores, {machine.memory_mb / 1024:.1f} GiB, {machine.gpus} GPUs, "
        f"{machine.shared_memory_mb} MiB of shared memory"
    )
    off = max(0.0, answer["time"] - answered) + min(0.0, answer["time"] - asked)
    if abs(off) > CLOCK_S:
        bad.append(Finding("clock", "warn", f"is {off:+.0f} s off", "synchronise (NTP)"))
    state: State = "ok"
    if bad:
        state = "fail" if any(finding.state == "fail" for finding in bad) else "warn"
    return Finding(
        name,
        state,
        "; ".join([says, *(f"{f.name}: {f.says}" for f in bad)]),
        "; ".join(f.fix for f in bad),
    )


def tell(findings: list[Finding], as_json: bool) -> bool:
    """Prints a line for each; whether nothing failed."""
    good = all(finding.state != "fail" for finding in findings)
    if as_json:
        result(json.dumps({"ok": good, "checks": [asdict(finding) for finding in findings]}))
        return good
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        line = f"{finding.state:<5} {finding.name:<{width}}  {finding.says}"
        result(f"{line}; fix: {finding.fix}" if finding.fix else line)
    return good
