"""A run on three hosts whose workers come, go, are drained and are lost; and a run as a Ray job."""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hosts import ROOT, Lab, hosts, wait_until

pytestmark = pytest.mark.lab

RAY = Path(sys.executable).with_name("ray")
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


@dataclass(frozen=True)
class World:
    lab: Lab
    folder: Path  # for outputs, outside of all hosts

    def accord(self, *words: object, code: int = 0, **env: str) -> str:
        """A command of ours on host 1, to its end."""
        done = self.lab.run(
            1, sys.executable, ROOT / "launch.py", *words, ACCORD_NO_BOOTSTRAP="1", **env
        )
        assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def run(self, name: str) -> Path:
        return self.lab.disk(1) / "runs" / name

    def rows(self, name: str, file: str) -> list[dict[str, Any]]:
        path = self.run(name) / file
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def events(self, name: str, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.rows(name, "events.jsonl") if row["kind"] == kind]

    def step(self, name: str) -> int:
        return max((row["step"] for row in self.rows(name, "metrics.jsonl")), default=0)

    def wait_for_steps(self, name: str, more: int, what: str) -> None:
        goal = self.step(name) + more
        wait_until(lambda: self.step(name) >= goal, 90, f"{more} steps {what}")


def prepared(lab: Lab, folder: Path) -> World:
    """The learner's resources are on host 1, room for workers on all three."""
    from learner.models.tiny import fresh_model, train_tokenizer

    inputs = lab.disk(1) / "inputs"
    inputs.mkdir()
    tokenizer = train_tokenizer(["how long does it last"] * 3, 320, inputs / "model")
    fresh_model(tokenizer, inputs / "model", hidden=64, layers=2, heads=2, intermediate=64)
    (inputs / "prompts.jsonl").write_text(PROMPTS)
    (lab.disk(1) / "train.toml").write_text(CONFIG.format(inputs="/host/inputs"))
    head = '--resources={"learner": 4, "rollout": 1}'
    lab.ray_head(cpus=4, words=(head, "--dashboard-host=127.0.0.1"))
    lab.ray_join_all(dict.fromkeys((2, 3), ('--resources={"rollout": 2}',)), cpus=3)
    return World(lab, folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with hosts(3) as lab:
        yield prepared(lab, tmp_path_factory.mktemp("out"))


def test_a_missing_token_is_told_at_once(world: World) -> None:
    words = ("train", "train.toml", "cluster.address=auto", "run.name=t")
    said = world.accord(*words, code=2, RAY_AUTH_TOKEN_PATH="/host/nothing", RAY_AUTH_MODE="token")
    assert "asks for Ray's token, and there is none in /host/nothing" in said


def test_a_job_leaves_a_checkpoint_when_it_is_stopped_and_goes_on(world: World) -> None:
    """The job's driver finds its cluster by itself, and writes where it is told to."""
    command = f"{sys.executable} {ROOT}/launch.py"
    job = ("job", "submit", "--address=http://127.0.0.1:8265", "--no-wait", "--submission-id=j")
    train = f"{command} train /host/train.toml run.dir=/host/runs run.name=j"
    done = world.lab.run(1, RAY, *job, "--", *train.split(), ACCORD_NO_BOOTSTRAP="1")
    assert done.returncode == 0, done.stdout + done.stderr
    try:
        try:
            world.wait_for_steps("j", 2, "of the job")
        except AssertionError as problem:
            logs = world.lab.run(1, RAY, "job", "logs", "--address=http://127.0.0.1:8265", "j")
            raise AssertionError(f"{problem}\n{logs.stdout}\n{logs.stderr}") from None
        said = world.accord("scale", "runs/j", 2)
        assert "1 → 2 workers: worker-1 serves after" in said
    finally:
        stopped = world.lab.run(1, RAY, "job", "stop", "--address=http://127.0.0.1:8265", "j")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    status = world.accord("status", "runs/j", "--json")
    saved = json.loads(status)["checkpoint"]["step"]
    assert saved >= 1
    said = world.accord(
        "train", "--resume", "runs/j", f"batch.steps={saved + 2}", RAY_ADDRESS="auto"
    )
    assert f"resuming at step {saved} of" in said


def test_a_run_is_scaled_drained_and_loses_a_host(world: World) -> None:
    lab = world.lab
    words = (sys.executable, ROOT / "launch.py", "train", "train.toml", "run.name=r")
    out = world.folder / "train.log"
    command = lab.start(1, *words, out=out, ACCORD_NO_BOOTSTRAP="1", RAY_ADDRESS="auto")
    try:
        wait_until(lambda: world.step("r") or command.poll() is not None, 120, "the first step")
        assert command.poll() is None, out.read_text()

        assert re.search(r"1 → 3 workers: .*serves after", scaled(world, 3))
        assert len({row["node"] for row in world.events("r", "worker_serving")}) >= 2
        assert re.search(r"3 → 0 workers: .*left after", scaled(world, 0))
        assert "paused after step" in world.accord("pause", "runs/r")
        assert "goes on after step" in world.accord("resume", "runs/r")
        assert re.search(r"0 → 2 workers: .*serves after", scaled(world, 2))
        world.wait_for_steps("r", 2, "after there was no worker")

        homes = workers_by_host(world, "r")
        first = next(host for host in (2, 3) if host in homes)
        drain(world, first)
        wait_until(
            lambda: {event["worker"] for event in world.events("r", "worker_left")} >= homes[first],
            60,
            f"{homes[first]} to leave host {first}",
        )
        wait_until(lambda: serving(world) >= 2, 90, "workers in their place")
        assert first not in workers_by_host(world, "r")
        world.wait_for_steps("r", 2, "after a node was drained")
        assert world.events("r", "worker_lost") == [], "nothing is lost while workers come and go"

        lab.kill(5 - first)
        wait_until(lambda: world.events("r", "worker_lost"), 90, "the loss to be noticed")
        world.wait_for_steps("r", 2, "after a host was lost")

        assert "stopped after step" in world.accord("stop", "runs/r")
        assert command.wait(60) == 0, out.read_text()
    finally:
        command.terminate()
    assert json.loads(world.accord("status", "runs/r", "--json"))["status"] == "stopped"
    world.accord("audit", "runs/r")


def scaled(world: World, workers: int) -> str:
    return world.accord("scale", "runs/r", workers, "--wait=100")


def serving(world: World, name: str = "r") -> int:
    return len(json.loads(world.accord("status", f"runs/{name}", "--json"))["workers"])


def node_ids(world: World) -> dict[str, int]:
    """Ray's node id -> number of the host."""
    code = (
        "import json, logging, ray; ray.init('auto', logging_level=logging.ERROR); "
        "print(json.dumps({n['NodeID']: n['NodeManagerHostname'] for n in ray.nodes()}))"
    )
    said = world.lab.run(1, sys.executable, "-c", code).stdout.splitlines()[-1]
    return {node: int(name.removeprefix("host")) for node, name in json.loads(said).items()}


def workers_by_host(world: World, name: str) -> dict[int, set[str]]:
    """Host -> the workers that serve there now."""
    nodes, homes = node_ids(world), dict[str, int]()
    for event in world.rows(name, "events.jsonl"):
        if event["kind"] == "worker_serving":
            homes[event["worker"]] = nodes[event["node"]]
        elif event["kind"] in ("worker_left", "worker_lost"):
            homes.pop(event["worker"], None)
    return {host: {w for w, home in homes.items() if home == host} for host in homes.values()}


def drain(world: World, host: int) -> None:
    """Announce that a host will go, as an autoscaler does."""
    node = next(node for node, number in node_ids(world).items() if number == host)
    done = world.lab.run(
        1,
        *(RAY, "drain-node", f"--address={world.lab.ray_address}", f"--node-id={node}"),
        *("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test"),
        "--deadline-remaining-seconds=60",
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_real_engines_on_hosts_that_are_killed_and_cut(make_lab: Any, tmp_path: Path) -> None:
    """vLLM on three hosts. The run goes on by itself, and every prompt is accounted for. Prints
    tokens per second before, during and after. By hand:
    `pytest -s -m "lab and long" tests/cluster/test_elastic.py`."""
    said: list[str] = []
    with make_lab(3) as lab:
        world = prepared(lab, tmp_path)
        words = (
            "train",
            "train.toml",
            "run.name=v",
            "rollout.engine=vllm",
            "rollout.max_tokens=32",
        )
        out = tmp_path / "train.log"
        command = lab.start(
            1,
            *(sys.executable, ROOT / "launch.py", *words),
            out=out,
            ACCORD_NO_BOOTSTRAP="1",
            RAY_ADDRESS="auto",
        )
        marks: list[tuple[str, float]] = []

        def during(what: str, steps: int = 4) -> None:
            marks.append((what, time.time()))
            goal = world.step("v") + steps
            wait_until(lambda: world.step("v") >= goal or command.poll() is not None, 300, what)
            assert command.poll() is None, out.read_text()

        during("the first steps")
        for wanted in (3, 0, 2):
            said.append(world.accord("scale", "runs/v", wanted, "--wait=240"))
            if wanted:
                during(f"{wanted} workers")
        killed = next(host for host in (2, 3) if host in workers_by_host(world, "v"))
        cut = 5 - killed
        lab.kill(killed)
        wait_until(lambda: serving(world, "v") >= 2, 300, "a worker in the place of the lost")
        during(f"host {killed} killed")
        lab.cut(cut)
        during(f"host {cut} cut", 2)
        wait_until(lambda: time.time() > marks[-1][1] + 60, 90, "the cut to last 60 s")
        lab.heal(cut)
        during(f"host {cut} healed", 2)
        lab.kill(cut)  # Ray had given it up; a host that comes back starts Ray anew
        lab.ray_join(cut, cpus=3, words=('--resources={"rollout": 2}',))
        wait_until(lambda: serving(world, "v") >= 2, 300, "two workers again")
        during(f"host {cut} is back")
        marks.append(("end", time.time()))
        said.append(world.accord("stop", "runs/v"))
        assert command.wait(120) == 0, out.read_text()
        said.append(world.accord("audit", "runs/v"))
        rows = world.rows("v", "metrics.jsonl")
        for (what, since), (_, until) in itertools.pairwise(marks):
            inside = [row for row in rows if since <= row["time"] <= until]
            if len(inside) > 1:
                first, last = inside[0], inside[-1]
                tokens = last["rollout/generated_tokens"] - first["rollout/generated_tokens"]
                rate = tokens / (last["time"] - first["time"])
                said.append(f"{what}: {rate:.0f} tokens per second in {len(inside)} steps")
        sys.stdout.write("\n".join(said) + "\n")
