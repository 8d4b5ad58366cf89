"""A training run on three hosts under random kills, cuts, heals and changes of scale.

    make soak SECONDS=600 SEED=0 [ENGINE=vllm] [ALSO="learner reward command"] [KEEP=folder]

Host 1 has the command, the learner and Ray's head; the workers are on hosts 2 and 3. What happens
when follows from the seed. ALSO names the other roles whose processes are killed, too; a killed
command is resumed. At the end everything is healed, the run is stopped with `accord stop`, and
`accord audit` must find every prompt accounted for. KEEP gets its logs and files.
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

from hosts import hosts, missing
from soak_report import run_totals, watched
from soak_run import HOSTS, LEARNER, SERVICE, WORKER, WORKER_HOSTS, SoakRun

Fault = Callable[[random.Random, float], bool]  # whether it hit something
ROLES = ("learner", "reward", "command")


@dataclass(slots=True)
class Faults:
    """Each method does something to the run, and returns whether there was something to hit."""

    run: SoakRun
    seed: int
    also: tuple[str, ...] = ()  # of ROLES
    tried: Counter[str] = field(default_factory=Counter)
    hit: Counter[str] = field(default_factory=Counter)

    def some_host(self, rng: random.Random) -> int:
        """One that has workers, where there is one."""
        found = [host for host in WORKER_HOSTS if self.run.processes((host,), WORKER)]
        return rng.choice(found or WORKER_HOSTS)

    def kill_worker(self, rng: random.Random, left_s: float) -> bool:
        return self._signal(rng, signal.SIGKILL) is not None

    def kill_learner(self, rng: random.Random, left_s: float) -> bool:
        return self._signal(rng, signal.SIGKILL, LEARNER) is not None

    def kill_reward(self, rng: random.Random, left_s: float) -> bool:
        return self._signal(rng, signal.SIGKILL, SERVICE) is not None

    def kill_command(self, rng: random.Random, left_s: float) -> bool:
        assert not self.run.ended, "the run has ended under the faults"
        self.run.sessions[-1].kill()
        self.run.sessions[-1].wait(30)
        self.run.train("--resume", "runs/soak")
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
        found = self.run.processes(HOSTS, role)
        if not found:
            return None
        pid = rng.choice(found)
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        return pid

    def cut_host(self, rng: random.Random, left_s: float) -> bool:
        host = self.some_host(rng)
        hit = bool(self.run.processes((host,), WORKER))
        self.run.lab.cut(host)
        time.sleep(min(left_s, rng.uniform(2, 15)))
        self.run.lab.heal(host)
        return hit

    def kill_host(self, rng: random.Random, left_s: float) -> bool:
        host = self.some_host(rng)
        hit = bool(self.run.processes((host,), WORKER))
        self.run.lab.kill(host)
        time.sleep(min(left_s, rng.uniform(1, 10)))
        self.run.join(host)
        return hit

    def scale(self, rng: random.Random, left_s: float) -> bool:
        count = rng.choice((0, 1, 3, 4))
        self.run.accord("scale", "runs/soak", str(count))
        if count == 0:
            time.sleep(min(left_s, rng.uniform(2, 8)))
            self.run.accord("scale", "runs/soak", "2")
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
            self.run.rejoin_all()
            assert not self.run.ended, "the run has ended under the faults"
            self.tried[fault.__name__] += 1
            self.hit[fault.__name__] += fault(rng, left_s)
            time.sleep(max(0.0, min(ends - time.monotonic(), rng.uniform(3, 12))))
            fault = first.pop(0) if first else rng.choices(list(faults), [*faults.values()])[0]


def soak(
    seconds: float,
    seed: int,
    engine: str = "transformers",
    also: tuple[str, ...] = (),
    keep: Path | None = None,
) -> dict[str, Any]:
    """Totals of the run and its audit. Raises AssertionError, with the end of the log, when the run
    did not survive or is not exact. ``keep``: a folder for its logs and files."""
    with hosts(3) as lab:
        run = SoakRun(lab, engine)
        faults = Faults(run, seed, also)
        began = time.monotonic()
        try:
            run.start()
            with watched(run.roles) as memory:
                faults.schedule(seconds)
                audit = run.end()
            return {
                "seconds": round(time.monotonic() - began),
                "seed": seed,
                "engine": engine,
                "faults": {
                    name: {"tried": tried, "hit": faults.hit[name]}
                    for name, tried in faults.tried.items()
                },
                **run_totals(run.run, audit),
                "memory": memory.report(),
                "left behind": run.left_behind(),
            }
        except BaseException:
            sys.stderr.write(f"{run.log()[-6000:]}\n{dict(faults.tried)}\n")
            raise
        finally:
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                run.keep(keep)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--seconds", type=float, default=600)
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--engine", default="transformers", choices=("transformers", "vllm"))
    words.add_argument("--also", default=[], nargs="*", choices=ROLES)
    words.add_argument("--keep", type=Path)
    given = words.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the hosts, too
    if (reason := missing()) is not None:
        sys.exit(f"no lab of hosts: {reason}")
    totals = soak(given.seconds, given.seed, given.engine, tuple(given.also), given.keep)
    sys.stdout.write(json.dumps(totals, indent=2) + "\n")


if __name__ == "__main__":
    main()
