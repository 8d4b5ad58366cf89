"""A run on the hosts of a lab whose workers come and go, and what its files say of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hosts import ROOT, Lab, wait_until

COMMAND = (sys.executable, ROOT / "launch.py")
PROMPTS = "".join(f'{{"prompt": "how long does it last {i}"}}\n' for i in range(64))
CONFIG = """
[model]
path = "{inputs}/model"
[data]
prompts = "{inputs}/prompts.jsonl"
[[reward.sources]]
type = "rules"
max_words = 3
[reward]
resources = {{learner = 1}}
[batch]
prompts_per_step = 4
samples_per_prompt = 2
steps = 100000
[rollout]
engine = "transformers"
max_tokens = 4
resources = {{rollout = 1}}
[learner]
resources = {{learner = 1}}
[checkpoint]
every = 20
[logging]
tensorboard = false
samples_every = 0
"""
ROOM = '--resources={"rollout": 2}'  # of each host but the first
TINY: dict[str, Any] = {"hidden": 64, "layers": 2, "heads": 2, "intermediate": 64}


@dataclass(frozen=True)
class World:
    lab: Lab
    folder: Path  # for outputs, outside of all hosts
    hosts_by_node: dict[str, int] = field(default_factory=dict)  # by Ray's node id

    def accord(self, *words: object, code: int = 0, **env: str) -> str:
        """A command of ours on host 1, to its end."""
        done = self.lab.run(1, *COMMAND, *words, timeout_s=300, ACCORD_NO_BOOTSTRAP="1", **env)
        assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def train(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        """A run on host 1; its output goes to ``log(name)``."""
        command = (*COMMAND, "train", "train.toml", f"run.name={name}", *words)
        env = {"ACCORD_NO_BOOTSTRAP": "1", "RAY_ADDRESS": "auto"}
        return self.lab.start(1, *command, out=self.log(name), **env)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def run(self, name: str) -> Path:
        return self.lab.disk(1) / "runs" / name

    def rows(self, name: str, file: str) -> list[dict[str, Any]]:
        path = self.run(name) / file
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def events(self, name: str, *kinds: str) -> list[dict[str, Any]]:
        return [row for row in self.rows(name, "events.jsonl") if row["kind"] in kinds]

    def step(self, name: str) -> int:
        return max((row["step"] for row in self.rows(name, "metrics.jsonl")), default=0)

    def wait_for_steps(self, name: str, more: int, what: str, timeout_s: float = 90) -> None:
        goal = self.step(name) + more
        wait_until(lambda: self.step(name) >= goal, timeout_s, f"{more} steps {what}")

    def homes(self, name: str) -> dict[str, str]:
        """Worker -> the node on which it serves now."""
        homes = dict[str, str]()
        for event in self.events(name, "worker_serving", "worker_left", "worker_lost"):
            if event["kind"] == "worker_serving":
                homes[event["worker"]] = event["node"]
            else:
                homes.pop(event["worker"], None)
        return homes

    def workers_by_host(self, name: str) -> dict[int, set[str]]:
        """Host -> the workers that serve there now."""
        homes = self.homes(name)
        if not set(homes.values()) <= self.hosts_by_node.keys():
            self.hosts_by_node.update(self._ask_nodes())
        found: dict[int, set[str]] = {}
        for worker, node in homes.items():
            found.setdefault(self.hosts_by_node[node], set()).add(worker)
        return found

    def node_of(self, host: int) -> str:
        """Ray's id of the living node on a host."""
        self.hosts_by_node.update(nodes := self._ask_nodes(alive=True))
        return next(node for node, number in nodes.items() if number == host)

    def _ask_nodes(self, *, alive: bool = False) -> dict[str, int]:
        code = (
            "import json, logging, ray; ray.init('auto', logging_level=logging.ERROR); "
            "print(json.dumps([n for n in ray.nodes()], default=str))"
        )
        said = self.lab.run(1, sys.executable, "-c", code).stdout.splitlines()[-1]
        return {
            node["NodeID"]: int(node["NodeManagerHostname"].removeprefix("host"))
            for node in json.loads(said)
            if node["Alive"] or not alive
        }

    def tokens_per_s(self, name: str, since: float, until: float) -> tuple[float, int]:
        """Completion tokens that were trained per second between two moments (seconds of the
        epoch), and the steps that ended between them."""
        rows = [row for row in self.rows(name, "metrics.jsonl") if since < row["time"] <= until]
        tokens = sum(row["perf/throughput"] * row["time/step"] for row in rows)
        return tokens / (until - since), len(rows)


def prepared(
    lab: Lab,
    folder: Path,
    text: str = CONFIG,
    shape: dict[str, Any] | None = None,
    room: Callable[[int], str] = lambda host: ROOM,
    head: str = '--resources={"learner": 4, "rollout": 1}',
    **env: str,
) -> World:
    """Ray on all hosts, inputs on host 1. The learner's resources are on host 1, and ``room`` for
    workers where it says so; ``env`` is Ray's."""
    from learner.models.tiny import fresh_model, train_tokenizer

    inputs = lab.disk(1) / "inputs"
    inputs.mkdir()
    tokenizer = train_tokenizer(["how long does it last"] * 3, 320, inputs / "model")
    fresh_model(tokenizer, inputs / "model", **(shape or TINY))
    (inputs / "prompts.jsonl").write_text(PROMPTS)
    (lab.disk(1) / "train.toml").write_text(text.format(inputs="/host/inputs"))
    lab.ray_head(cpus=4, words=(head, "--dashboard-host=127.0.0.1"), **env)
    others = range(2, lab.count + 1)
    lab.ray_join_all({host: (room(host),) for host in others}, cpus=3, **env)
    return World(lab, folder)
