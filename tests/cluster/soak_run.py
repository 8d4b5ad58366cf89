"""The run of a soak: three hosts, a small model, the command on host 1."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hosts import ROOT, Lab, wait_until
from soak_report import unfinished_files

WORKER_HOSTS = (2, 3)
ROOM = '--resources={"rollout": 2}'  # of each of them
HOSTS = (1, *WORKER_HOSTS)
WORKER = b"ray::RolloutActor"  # in the title of a worker's process
LEARNER, SERVICE = b"ray::LearnerActor", b"ray::_RewardActor"
COMMAND = b"launch.py\0train"
PROMPTS = "".join(f'{{"prompt": "how long does it last {i}"}}\n' for i in range(64))
REWARD = (
    "def score(completions, **columns):\n    return [float(len(str(c))) for c in completions]\n"
)
CONFIG = """
[model]
path = "{inputs}/model"
[data]
prompts = "{inputs}/prompts.jsonl"
[[reward.sources]]
type = "function"
path = "{inputs}/reward.py:score"
[batch]
prompts_per_step = 4
samples_per_prompt = 2
steps = 1000000
[staleness]
bound = 2
[rollout]
engine = "{engine}"
workers = 2
max_tokens = 24
stall_timeout_s = 20
max_restarts = 1000
resources = {{ rollout = 1 }}
[learner]
max_restarts = 1000
resources = {{ learner = 1 }}
[run]
name = "soak"
[checkpoint]
every = 20
[cluster]
address = "{address}"
"""
# A lost host is noticed within seconds, not within half a minute.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "3000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
}


@dataclass(slots=True)
class SoakRun:
    lab: Lab
    engine: str
    sessions: list[Any] = field(default_factory=list)  # processes of the command

    @property
    def run(self) -> Path:
        return self.lab.disk(1) / "runs" / "soak"

    def start(self) -> None:
        from learner.models.tiny import fresh_model, train_tokenizer

        inputs = self.lab.disk(1).parents[1] / "inputs"  # every host sees it
        inputs.mkdir()
        (inputs / "prompts.jsonl").write_text(PROMPTS)
        (inputs / "reward.py").write_text(REWARD)
        tokenizer = train_tokenizer(["how long does it last battery"] * 3, 320, inputs / "model")
        fresh_model(tokenizer, inputs / "model", hidden=32, layers=1, heads=1, intermediate=32)
        text = CONFIG.format(inputs=inputs, engine=self.engine, address=self.lab.ray_address)
        (self.lab.disk(1) / "train.toml").write_text(text)
        self.lab.ray_head(cpus=4, words=('--resources={"learner": 1}',), **HEALTH)
        self.lab.ray_join_all(dict.fromkeys(WORKER_HOSTS, (ROOM,)), cpus=4, **HEALTH)
        self.train("train.toml")

    def train(self, *words: str) -> None:
        """Start the command, and wait for two steps of it."""
        log = self.lab.disk(1) / f"log-{len(self.sessions)}"
        command = (sys.executable, ROOT / "launch.py", "train", *words)
        process = self.lab.start(1, *command, out=log, ACCORD_NO_BOOTSTRAP="1")
        self.sessions.append(process)
        goal = self.steps() + 2
        wait_until(lambda: self.steps() >= goal or self.ended, 300, f"step {goal}")
        assert not self.ended, "the command has ended at its start"

    @property
    def ended(self) -> bool:
        return self.sessions[-1].poll() is not None

    def log(self) -> str:
        path = self.lab.disk(1) / f"log-{len(self.sessions) - 1}"
        return path.read_text(errors="replace") if path.is_file() else ""

    def join(self, host: int) -> None:
        """Again where Ray itself does not start in time, as on a machine with much else to do."""
        for tries_left in (2, 1, 0):
            try:
                self.lab.ray_join(host, cpus=4, words=(ROOM,), **HEALTH)
            except (RuntimeError, subprocess.TimeoutExpired):
                if not tries_left:
                    raise
                self.lab.kill(host)
            else:
                return

    def rejoin_all(self) -> None:
        """A host that Ray took for dead ends its own processes: start them anew."""
        for host in WORKER_HOSTS:
            if not self.processes((host,), b"raylet/raylet"):
                self.lab.kill(host)
                self.join(host)

    def accord(self, *words: str, timeout_s: float = 300) -> str:
        command = (sys.executable, ROOT / "launch.py", *words)
        done = self.lab.run(1, *command, timeout_s=timeout_s, ACCORD_NO_BOOTSTRAP="1")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def steps(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.read_text().count("\n") if path.is_file() else 0

    def processes(self, hosts: tuple[int, ...], word: bytes) -> list[int]:
        found = []
        for host in hosts:
            for pid in self.lab.pids(host):
                with suppress(OSError):
                    if word in Path(f"/proc/{pid}/cmdline").read_bytes():
                        found.append(pid)
        return sorted(found)

    def end(self) -> dict[str, Any]:
        """Heal everything, see that the run goes on, stop it, and audit it."""
        assert not self.ended, "the run has ended under the faults"
        for host in WORKER_HOSTS:
            self.lab.heal(host)
        time.sleep(10)  # until then, Ray may take one that was cut for dead
        self.rejoin_all()
        self.accord("scale", "runs/soak", "2")
        before = self.steps()
        wait_until(lambda: self.steps() >= before + 5, 300, "five steps after all was healed")
        self.accord("stop", "runs/soak")
        wait_until(lambda: self.ended, 120, "the end of the run")
        said = self.accord("audit", "runs/soak", "--json", timeout_s=600)
        audit: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
        return audit

    def roles(self) -> dict[str, list[int]]:
        return {"command": self.processes((1,), COMMAND), "learner": self.processes((1,), LEARNER)}

    def left_behind(self) -> dict[str, Any]:
        """Processes of the run, ten seconds and more after its end, and files of no more use."""

        def alive() -> list[int]:
            return [
                pid
                for title in (WORKER, LEARNER, SERVICE, COMMAND)
                for pid in self.processes(HOSTS, title)
            ]

        with suppress(AssertionError):
            wait_until(lambda: not alive(), 30, "the processes to be gone")
        temporary = {
            f"host {host}": sorted(
                path.name for path in (self.lab.disk(host).parent / "tmp").iterdir()
            )
            for host in HOSTS
        }
        return {
            "processes": len(alive()),
            "files of the run": unfinished_files(self.run),
            "temporary": temporary,
        }

    def keep(self, folder: Path) -> None:
        """Copy what tells how it went; rollouts and checkpoints are left out."""
        left_out = shutil.ignore_patterns("rollouts", "checkpoints", ".*")
        with suppress(OSError, shutil.Error):
            shutil.copytree(self.run, folder / "run", ignore=left_out, dirs_exist_ok=True)
        for log in self.lab.disk(1).glob("log-*"):
            shutil.copy(log, folder)
