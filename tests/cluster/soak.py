"""A training run on three hosts under random kills, cuts, heals and changes of scale.

    make soak SECONDS=600 SEED=0 [ENGINE=vllm] [ALSO="learner reward command"]

Host 1 has the command, the learner and Ray's head; the workers are on hosts 2 and 3. What happens
when follows from the seed. ALSO names the other roles whose processes are killed, too; a killed
command is resumed. At the end everything is healed, the run is stopped with `accord stop`, and
`accord audit` must find every prompt accounted for.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hosts import ROOT, Lab, hosts, missing, wait_until
from soak_report import run_totals, unfinished_files, watched

Fault = Callable[[random.Random, float], bool]  # whether it hit something
WORKER_HOSTS = (2, 3)
ROOM = '--resources={"rollout": 2}'  # of each of them
HOSTS = (1, *WORKER_HOSTS)
WORKER = b"ray::RolloutActor"  # in the title of a worker's process
LEARNER, SERVICE = b"ray::LearnerActor", b"ray::_RewardActor"
COMMAND = b"launch.py\0train"
ROLES = ("learner", "reward", "command")
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
class Soak:
    lab: Lab
    seed: int
    engine: str
    also: tuple[str, ...] = ()  # of ROLES
    tried: Counter[str] = field(default_factory=Counter)  # what was done to the run
    hit: Counter[str] = field(default_factory=Counter)  # ... while there was something to hit
    sessions: list[Any] = field(default_factory=list)  # processes of the command

    @property
    def run(self) -> Path:
        return self.lab.disk(1) / "runs" / "soak"

    # -- the run ----------------------------------------------------------------------------------

    def start(self) -> None:
        from learner.models.tiny import fresh_model, train_tokenizer

        inputs = (
            self.lab.disk(1).parents[1] / "inputs"
        )  # every host sees it; /host is of each alone
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
        self.lab.ray_join(host, cpus=4, words=(ROOM,), **HEALTH)

    def accord(self, *words: str, timeout_s: float = 300) -> str:
        command = (sys.executable, ROOT / "launch.py", *words)
        done = self.lab.run(1, *command, timeout_s=timeout_s, ACCORD_NO_BOOTSTRAP="1")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def steps(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.read_text().count("\n") if path.is_file() else 0

    # -- faults -----------------------------------------------------------------------------------

    def processes(self, hosts: tuple[int, ...], word: bytes) -> list[int]:
        found = []
        for host in hosts:
            for pid in self.lab.pids(host):
                with suppress(OSError):
                    if word in Path(f"/proc/{pid}/cmdline").read_bytes():
                        found.append(pid)
        return sorted(found)

    def some_host(self, rng: random.Random) -> int:
        """One that has workers, where there is one."""
        found = [host for host in WORKER_HOSTS if self.processes((host,), WORKER)]
        return rng.choice(found or WORKER_HOSTS)

    def kill_worker(self, rng: random.Random, left_s: float) -> bool:
        return self._signal(rng, signal.SIGKILL) is not None

    def kill_learner(self, rng: random.Random, left_s: float) -> bool:
        return self._signal(rng, signal.SIGKILL, LEARNER) is not None

    def kill_reward(self, rng: random.Random, left_s: float) -> bool:
        return self._signal(rng, signal.SIGKILL, SERVICE) is not None

    def kill_command(self, rng: random.Random, left_s: float) -> bool:
        assert not self.ended, "the run has ended under the faults"
        self.sessions[-1].kill()
        self.sessions[-1].wait(30)
        self.train("--resume", "runs/soak")
        return True

    def stop_worker(self, rng: random.Random, left_s: float) -> bool:
        """It hangs for a while and then comes to itself again: a zombie, if it was replaced."""
        pid = self._signal(rng, signal.SIGSTOP)
        time.sleep(min(left_s, rng.uniform(2, 8)))
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        return pid is not None

    def _signal(self, rng: random.Random, number: int, role: bytes = WORKER) -> int | None:
        """Which process got it; None where the role has none at the moment."""
        found = self.processes(HOSTS, role)
        if not found:
            return None
        pid = rng.choice(found)
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        return pid

    def cut_host(self, rng: random.Random, left_s: float) -> bool:
        host = self.some_host(rng)
        hit = bool(self.processes((host,), WORKER))
        self.lab.cut(host)
        time.sleep(min(left_s, rng.uniform(2, 15)))
        self.lab.heal(host)
        self.rejoin(host)
        return hit

    def kill_host(self, rng: random.Random, left_s: float) -> bool:
        host = self.some_host(rng)
        hit = bool(self.processes((host,), WORKER))
        self.lab.kill(host)
        time.sleep(min(left_s, rng.uniform(1, 10)))
        self.join(host)
        return hit

    def rejoin(self, host: int) -> None:
        """A host that Ray took for dead ends its own processes: start them anew."""
        time.sleep(3)
        if not self.processes((host,), b"raylet/raylet"):
            self.lab.kill(host)
            self.join(host)

    def scale(self, rng: random.Random, left_s: float) -> bool:
        self.accord("scale", "runs/soak", str(rng.choice((0, 2, 3, 4))))
        return True

    def schedule(self, seconds: float) -> None:
        """One fault after the other, with pauses."""
        rng = random.Random(self.seed)
        killed = dict(
            zip(ROLES, (self.kill_learner, self.kill_reward, self.kill_command), strict=True)
        )
        others: list[Fault] = [killed[role] for role in self.also]
        faults: dict[Fault, int] = {  # and how often
            self.kill_worker: 5,
            self.stop_worker: 2,
            self.cut_host: 2,
            self.kill_host: 2,
            self.scale: 2,
            **dict.fromkeys(others, 2),
        }
        ends = time.monotonic() + seconds
        first: list[Fault] = [self.kill_worker, *others]  # whatever the seed, once at least
        fault = first.pop(0)
        while (left_s := ends - time.monotonic()) > 0:
            assert not self.ended, "the run has ended under the faults"
            self.tried[fault.__name__] += 1
            self.hit[fault.__name__] += fault(rng, left_s)
            time.sleep(max(0.0, min(ends - time.monotonic(), rng.uniform(3, 12))))
            fault = first.pop(0) if first else rng.choices(list(faults), [*faults.values()])[0]

    # -- the end ----------------------------------------------------------------------------------

    def end(self) -> dict[str, Any]:
        """Heal everything, see that the run goes on, stop it, and audit it."""
        assert not self.ended, "the run has ended under the faults"
        for host in WORKER_HOSTS:
            self.lab.heal(host)
            self.rejoin(host)
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


def soak(
    seconds: float, seed: int, engine: str = "transformers", also: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Totals of the run and its audit. Raises AssertionError, with the end of the log, when the run
    did not survive or is not exact."""
    with hosts(3) as lab:
        made = Soak(lab, seed, engine, also)
        began = time.monotonic()
        try:
            made.start()
            with watched(made.roles) as memory:
                made.schedule(seconds)
                audit = made.end()
        except BaseException:
            sys.stderr.write(made.log()[-6000:])
            raise
        return {
            "seconds": round(time.monotonic() - began),
            "seed": seed,
            "engine": engine,
            "faults": {
                name: {"tried": tried, "hit": made.hit[name]} for name, tried in made.tried.items()
            },
            **run_totals(made.run, audit),
            "memory": memory.report(),
            "left behind": made.left_behind(),
        }


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--seconds", type=float, default=600)
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--engine", default="transformers", choices=("transformers", "vllm"))
    words.add_argument("--also", default=[], nargs="*", choices=ROLES)
    given = words.parse_args()
    if (reason := missing()) is not None:
        sys.exit(f"no lab of hosts: {reason}")
    totals = soak(given.seconds, given.seed, given.engine, tuple(given.also))
    sys.stdout.write(json.dumps(totals, indent=2) + "\n")


if __name__ == "__main__":
    main()
