"""What it costs a run that workers come, go and are killed, and that weights cross a slow link.

    make elasticity PART=joins|kills|push [ENGINE=transformers|vllm]

Each part has a lab of its own, prints its figures and adds them to
``benchmarks/results/elasticity.json``:

- ``joins``: seconds from a request for one more worker until it serves with verified weights.
- ``kills``: tokens trained per second with three workers, undisturbed and with one of them killed
  every 30 s, in one run; seconds from a kill until the replacement serves; what checkpoints cost.
- ``push``: seconds in which three hosts get an update of the weights over links of 100 Mbit/s.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from elastic_world import World, prepared
from hosts import ROOT, hosts, missing, wait_until

from cluster.measure.bench.common import hardware
from cluster.runs.control import ask

RESULTS = ROOT / "benchmarks" / "results" / "elasticity.json"
NAME = "e"  # of the run
START_S = 300.0
KILL_EVERY_S = 30.0
UNDISTURBED_S = 60.0
MBIT_PER_S = 100
LARGER: dict[str, Any] = {"hidden": 256, "layers": 6, "heads": 4, "intermediate": 768}
Figures = dict[str, Any]


@contextmanager
def training(world: World, *words: str, first_steps: int = 2) -> Iterator[Any]:
    """A run that has trained its first steps; it is stopped and its books are checked."""
    command = world.train(NAME, *words)
    try:
        reach(world, command, lambda: world.step(NAME) >= first_steps, "the first steps")
        yield command
        if command.poll() is None:
            world.accord("stop", f"runs/{NAME}")
        assert command.wait(120) == 0, world.log(NAME).read_text()[-4000:]
        world.accord("audit", f"runs/{NAME}")
    finally:
        command.terminate()


def reach(world: World, command: Any, reached: Callable[[], bool], what: str) -> None:
    wait_until(lambda: reached() or command.poll() is not None, START_S, what, every_s=0.5)
    if not reached():
        raise AssertionError(f"{what}: the run has ended\n{world.log(NAME).read_text()[-4000:]}")


def spread(values: list[float]) -> Figures:
    ordered = sorted(values)
    last = min(len(ordered) - 1, int(0.99 * len(ordered)))
    return {
        "count": len(ordered),
        "median_s": round(statistics.median(ordered), 4),
        "p99_s": round(ordered[last], 4),  # the largest, of fewer than a hundred
        "all_s": [round(value, 4) for value in values],
    }


# -- the parts -------------------------------------------------------------------------------------


def joins(folder: Path, engine: str, count: int) -> Figures:
    took: list[float] = []
    built: list[float] = []
    with hosts(3) as lab:
        world = prepared(lab, folder)
        with training(world, f"rollout.engine={engine}") as command:
            run = world.run(NAME)
            for _ in range(count):
                asked = time.time()
                ask(run, workers=2)
                reach(world, command, lambda: len(world.homes(NAME)) == 2, "a joiner")
                joined = world.events(NAME, "worker_serving")[-1]
                took.append(joined["time"] - asked)
                built.append(joined["seconds"])
                ask(run, workers=1)
                reach(world, command, lambda: len(world.homes(NAME)) == 1, "it to leave")
    return {"request to serving": spread(took), "of it building the engine": spread(built)}


def kills(folder: Path, engine: str, count: int) -> Figures:
    with hosts(3) as lab:
        world = prepared(lab, folder)
        words = (f"rollout.engine={engine}", "rollout.max_tokens=32", "rollout.workers=3")
        with training(world, *words, "staleness.bound=2") as command:
            reach(world, command, lambda: len(world.homes(NAME)) == 3, "three workers")
            time.sleep(10)
            began = time.time()
            time.sleep(UNDISTURBED_S)
            disturbed = time.time()
            killed: list[tuple[float, str]] = []
            for number in range(count):
                killed.append((time.time(), kill_a_worker(world)))
                time.sleep(max(0.0, disturbed + (number + 1) * KILL_EVERY_S - time.time()))
                assert command.poll() is None, world.log(NAME).read_text()[-4000:]
            ended = time.time()
            reach(world, command, lambda: len(world.homes(NAME)) == 3, "three workers again")
        before, steps_before = world.tokens_per_s(NAME, began, disturbed)
        during, steps_during = world.tokens_per_s(NAME, disturbed, ended)
        return {
            "tokens trained per second, undisturbed": round(before, 1),
            "tokens trained per second, one killed every 30 s": round(during, 1),
            "ratio": round(during / before, 3),
            "steps": [steps_before, steps_during],
            "seconds": [round(disturbed - began), round(ended - disturbed)],
            "kill to replacement serving": spread(replacements(world, killed)),
            "lost": [event["cause"][:120] for event in world.events(NAME, "worker_lost")],
            "checkpoints": checkpoints(world, began, disturbed),
        }


def kill_a_worker(world: World) -> str:
    """The process of the worker that has served longest; the worker's name."""
    serving = world.homes(NAME)
    events = {e["worker"]: e for e in world.events(NAME, "worker_serving")}  # the last of each
    worker = min(serving, key=lambda name: float(events[name]["time"]))
    os.kill(events[worker]["pid"], signal.SIGKILL)
    return worker


def replacements(world: World, killed: list[tuple[float, str]]) -> list[float]:
    """Seconds from each kill until that worker serves again."""
    serving = world.events(NAME, "worker_serving")
    return [
        next(e["time"] for e in serving if e["worker"] == worker and e["time"] > at) - at
        for at, worker in killed
    ]


def checkpoints(world: World, since: float, until: float) -> Figures:
    """What those cost that were written between two moments."""
    written = [e for e in world.events(NAME, "checkpoint") if since < e["time"] <= until]
    waited, beside = (sum(e[key] for e in written) for key in ("learner_waited_s", "seconds"))
    return {
        "count": len(written),
        "bytes": max((e["bytes"] for e in written), default=0),
        "share of wall time in which the learner waited": round(waited / (until - since), 5),
        "share of wall time in which one was being written": round(beside / (until - since), 4),
    }


def push(folder: Path, engine: str, count: int) -> Figures:
    """Learner on host 1, a worker on each of three others."""
    with hosts(4) as lab:
        room = '--resources={"rollout": 1}'
        head = '--resources={"learner": 4}'
        world = prepared(lab, folder, shape=LARGER, room=lambda host: room, head=head)
        for host in range(1, lab.count + 1):
            lab.rate(host, MBIT_PER_S)
        words = (f"rollout.engine={engine}", "rollout.workers=3", "checkpoint.every=5")
        began = time.time()
        with training(world, *words, f"batch.steps={count}") as command:
            reach(world, command, lambda: command.poll() is not None, "the end of the run")
        rows = world.rows(NAME, "metrics.jsonl")
        pushed = [row for row in rows if "weight_sync/seconds" in row]
        nbytes = int(pushed[-1]["weight_sync/bytes"])
        one_s = nbytes * 8 / (MBIT_PER_S * 1e6)
        return {
            "bytes": nbytes,
            "bytes over bandwidth, one copy": round(one_s, 2),
            "bytes over bandwidth, three copies from one host": round(3 * one_s, 2),
            "push to three hosts": spread([row["weight_sync/seconds"] for row in pushed]),
            "longest pause of a worker": spread([row["weight_sync/pause_s"] for row in pushed]),
            "checkpoints": checkpoints(world, began, time.time()),
        }


PARTS: dict[str, tuple[Callable[[Path, str, int], Figures], int]] = {
    "joins": (joins, 20),
    "kills": (kills, 6),
    "push": (push, 10),
}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("part", choices=PARTS)
    words.add_argument("--engine", default="transformers", choices=("transformers", "vllm"))
    words.add_argument("--count", type=int, help="joins, kills or steps; default 20, 6, 10")
    words.add_argument("--json", type=Path, default=RESULTS)
    given = words.parse_args()
    if (reason := missing()) is not None:
        sys.exit(f"no lab of hosts: {reason}")
    measure, usual = PARTS[given.part]
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), given.engine, given.count or usual)
    loads.append(os.getloadavg()[0])
    record = {"date": time.strftime("%Y-%m-%d"), **hardware(), "load before and after": loads}
    path: Path = given.json
    stored = json.loads(path.read_text()) if path.exists() else {"benchmark": "elasticity"}
    stored[f"{given.part}, {given.engine}"] = record | {"figures": figures}
    path.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
