"""A run that repeats itself bit for bit, what it writes, and which of its processes is which."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import psutil

from cluster.runs.audit import audit_run

COMMAND_S = 600.0  # beyond every command of these tests
LEARNER, REWARD = "ray::LearnerActor", "ray::_RewardActor"  # begin the titles of their processes
# Scores differ from completion to completion, or nothing would be learnt and all runs be equal.
RULES = 'type = "rules"\nrequired = ["a", "e", "o", "s", "t"]'

# What these tests do not look at takes as long to start as all the rest of a run.
CHEAP = {
    "cluster": "object_store_mb = 80\ndashboard = false",
    "logging": "ray_metrics = false\ntensorboard = false\nsamples_every = 0",
}


def run_of(line: Any) -> Path:
    return Path(line.folder / "runs" / "r")


def repeatable(
    line: Any, world: Any, *, steps: int = 6, every: int = 2, source: str = RULES, **sections: str
) -> Path:
    """The config of a run as docs/operate.md says in "The same run twice". ``source``: of
    rewards; ``sections``: more lines of a table, or a table."""
    tables = {
        "batch": f"prompts_per_step = 2\nsamples_per_prompt = 2\nsteps = {steps}",
        "rollout": 'engine = "transformers"\nmax_tokens = 6\nrequest_seeds = true\nworkers = 1',
        "staleness": "bound = 0",
        "learner": "lr = 1e-2\ndeterministic = true",
        "checkpoint": f"every = {every}",
        **CHEAP,
    }
    for name, more in sections.items():
        tables[name] = f"{tables[name]}\n{more}" if name in tables else more
    made: Path = world.train_toml(line.folder / "c.toml", source, **tables)
    return made


def policy_files(line: Any, world: Any) -> dict[str, str]:
    """Name -> SHA-256 of the policy's files. Its weights are not those that the run began with."""
    policy = run_of(line) / "policy"
    files = {path.name: sha256(path) for path in policy.iterdir()}
    assert files["model.safetensors"] != sha256(world.policy / "model.safetensors")
    return files


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may be being written."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def events(line: Any, kind: str) -> list[dict[str, Any]]:
    return [row for row in rows(run_of(line) / "events.jsonl") if row["kind"] == kind]


def steps_done(line: Any) -> int:
    return max((row["step"] for row in rows(run_of(line) / "metrics.jsonl")), default=0)


def live(line: Any) -> dict[str, Any]:
    """What live.json says now; empty where it is not there yet."""
    path = run_of(line) / "live.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def exact(line: Any) -> None:
    assert audit_run(str(run_of(line))).violations == []


def processes(command: Any, role: str) -> list[psutil.Process]:
    """Those of a role that the command has started, oldest first."""
    found = []
    for child in psutil.Process(command.process.pid).children(recursive=True):
        try:
            if " ".join(child.cmdline()).startswith(role):
                found.append((child.create_time(), child.pid, child))
        except psutil.NoSuchProcess:
            continue
    return [child for _, _, child in sorted(found, key=lambda one: one[:2])]
