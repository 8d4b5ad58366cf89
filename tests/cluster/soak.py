"""A training run on three hosts under random kills, cuts, heals and changes of scale.

    make soak SECONDS=600 SEED=0 [ENGINE=vllm] [ALSO="learner reward"]

Host 1 has the command, the learner and Ray's head; the workers are on hosts 2 and 3. What happens
when follows from the seed. ALSO names the other roles whose processes are killed, too. At the end
everything is healed, the run is stopped with `accord stop`, and `accord audit` must find every
prompt accounted for.
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

Fault = Callable[[random.Random, float], None]
WORKER_HOSTS = (2, 3)
ROOM = '--resources={"rollout": 2}'  # of each of them
HOSTS = (1, *WORKER_HOSTS)
WORKER = b"ray::RolloutActor"  # in the title of a worker's process
LEARNER, SERVICE = b"ray::LearnerActor", b"ray::_RewardActor"
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
COUNTED = (  # events
    *("worker_lost", "worker_not_joined", "worker_serving", "worker_left", "stale_result_refused"),
    *("learner_lost", "learner_replaced", "rolled_back"),
    *("reward_service_lost", "reward_service_restarted"),
)
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
    also: tuple[str, ...] = ()  # of "learner" and "reward"
    done: Counter[str] = field(default_factory=Counter)  # what was done to the run

    @property
    def run(self) -> Path:
        return self.lab.disk(1) / "runs" / "soak"

    # -- the run ----------------------------------------------------------------------------------

    def start(self) -> Any:
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
        return self.lab.start(
            1,
            *(sys.executable, ROOT / "launch.py", "train", "train.toml"),
            out=self.lab.disk(1) / "log",
            ACCORD_NO_BOOTSTRAP="1",
        )

    def join(self, host: int) -> None:
        self.lab.ray_join(host, cpus=4, words=(ROOM,), **HEALTH)

    def accord(self, *words: str) -> tuple[int, str]:
        done = self.lab.run(1, sys.executable, ROOT / "launch.py", *words, ACCORD_NO_BOOTSTRAP="1")
        return done.returncode, done.stdout + done.stderr

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

    def kill_worker(self, rng: random.Random, left_s: float) -> None:
        self._signal(rng, signal.SIGKILL)

    def kill_learner(self, rng: random.Random, left_s: float) -> None:
        self._signal(rng, signal.SIGKILL, LEARNER)

    def kill_reward(self, rng: random.Random, left_s: float) -> None:
        self._signal(rng, signal.SIGKILL, SERVICE)

    def stop_worker(self, rng: random.Random, left_s: float) -> None:
        """It hangs for a while and then comes to itself again: a zombie, if it was replaced."""
        pid = self._signal(rng, signal.SIGSTOP)
        time.sleep(min(left_s, rng.uniform(2, 8)))
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _signal(self, rng: random.Random, number: int, role: bytes = WORKER) -> int | None:
        """Which process got it; None where the role has none at the moment."""
        found = self.processes(HOSTS, role)
        if not found:
            return None
        pid = rng.choice(found)
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        return pid

    def cut_host(self, rng: random.Random, left_s: float) -> None:
        host = self.some_host(rng)
        self.lab.cut(host)
        time.sleep(min(left_s, rng.uniform(2, 15)))
        self.lab.heal(host)
        self.rejoin(host)

    def kill_host(self, rng: random.Random, left_s: float) -> None:
        host = self.some_host(rng)
        self.lab.kill(host)
        time.sleep(min(left_s, rng.uniform(1, 10)))
        self.join(host)

    def rejoin(self, host: int) -> None:
        """A host that Ray took for dead ends its own processes: start them anew."""
        time.sleep(3)
        if not self.processes((host,), b"raylet/raylet"):
            self.lab.kill(host)
            self.join(host)

    def scale(self, rng: random.Random, left_s: float) -> None:
        self.accord("scale", "runs/soak", str(rng.choice((0, 2, 3, 4))))

    def schedule(self, seconds: float) -> None:
        """One fault after the other, with pauses."""
        rng = random.Random(self.seed)
        killed: dict[str, Fault] = {"learner": self.kill_learner, "reward": self.kill_reward}
        others = [killed[role] for role in self.also]
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
            self.done[fault.__name__] += 1
            fault(rng, left_s)
            time.sleep(max(0.0, min(ends - time.monotonic(), rng.uniform(3, 12))))
            fault = first.pop(0) if first else rng.choices(list(faults), [*faults.values()])[0]


def soak(
    seconds: float, seed: int, engine: str = "transformers", also: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Totals of the run and its audit. Raises AssertionError, with the end of the log, when the run
    did not survive or is not exact."""
    with hosts(3) as lab:
        made = Soak(lab, seed, engine, also)
        log = lab.disk(1) / "log"
        began = time.monotonic()
        process = made.start()
        try:
            wait_until(lambda: made.steps() >= 2 or process.poll() is not None, 180, "step 2")
            assert process.poll() is None, "the run has ended at its start"
            faultless = made.steps()
            made.schedule(seconds)
            assert process.poll() is None, "the run has ended under the faults"
            for host in WORKER_HOSTS:
                lab.heal(host)
                made.rejoin(host)
            code, said = made.accord("scale", "runs/soak", "2")
            assert code == 0, said
            before = made.steps()
            wait_until(lambda: made.steps() >= before + 5, 180, "five steps after all was healed")
            code, said = made.accord("stop", "runs/soak")
            wait_until(lambda: process.poll() is not None, 120, "the end of the run")
            code, said = made.accord("audit", "runs/soak", "--json")
            assert code == 0, said
        except BaseException:
            sys.stderr.write(log.read_text(errors="replace")[-6000:])
            raise
        events: Counter[str] = Counter()
        for line in (made.run / "events.jsonl").read_text().splitlines():
            events[json.loads(line)["kind"]] += 1
        found = json.loads(said.strip().splitlines()[-1])
        return {
            "seconds": round(time.monotonic() - began),
            "seed": seed,
            "engine": engine,
            "faults": dict(made.done),
            "events": {name: events[name] for name in COUNTED},
            "steps before": faultless,
            "audit": found,
        }


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--seconds", type=float, default=600)
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--engine", default="transformers", choices=("transformers", "vllm"))
    words.add_argument("--also", default=[], nargs="*", choices=("learner", "reward"))
    given = words.parse_args()
    if (reason := missing()) is not None:
        sys.exit(f"no lab of hosts: {reason}")
    totals = soak(given.seconds, given.seed, given.engine, tuple(given.also))
    sys.stdout.write(json.dumps(totals, indent=2) + "\n")


if __name__ == "__main__":
    main()
