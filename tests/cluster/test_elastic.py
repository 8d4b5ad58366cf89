"""A run on three hosts whose workers come, go, are drained and are lost; and a run as a Ray job."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from elastic_world import World, prepared
from hosts import ROOT, hosts, wait_until

pytestmark = pytest.mark.lab

RAY = Path(sys.executable).with_name("ray")


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
    patient = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})
    command = f"{sys.executable} {ROOT}/launch.py"
    job = ("job", "submit", "--address=http://127.0.0.1:8265", "--no-wait", "--submission-id=j")
    train = f"{command} train /host/train.toml run.dir=/host/runs run.name=j"
    options = (*job, f"--runtime-env-json={patient}", "--")
    done = world.lab.run(1, RAY, *options, *train.split(), ACCORD_NO_BOOTSTRAP="1")
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
    command, out = world.train("r"), world.log("r")
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

        homes = world.workers_by_host("r")
        first = next(host for host in (2, 3) if host in homes)
        drain(world, first)
        wait_until(
            lambda: {event["worker"] for event in world.events("r", "worker_left")} >= homes[first],
            180,
            f"{homes[first]} to leave host {first}",
        )
        wait_until(lambda: len(world.homes("r")) >= 2, 240, "workers in their place")
        assert first not in world.workers_by_host("r")
        world.wait_for_steps("r", 2, "after a node was drained")
        assert world.events("r", "worker_lost") == [], "nothing is lost while workers come and go"

        lab.kill(5 - first)
        wait_until(lambda: world.events("r", "worker_lost"), 180, "the loss to be noticed")
        world.wait_for_steps("r", 2, "after a host was lost")

        assert "stopped after step" in world.accord("stop", "runs/r")
        assert command.wait(60) == 0, out.read_text()
    finally:
        command.terminate()
    assert json.loads(world.accord("status", "runs/r", "--json"))["status"] == "stopped"
    world.accord("audit", "runs/r")


def scaled(world: World, workers: int) -> str:
    return world.accord("scale", "runs/r", workers, "--wait=100")


def drain(world: World, host: int) -> None:
    """Announce that a host will go, as an autoscaler does."""
    node = world.node_of(host)
    done = world.lab.run(
        1,
        *(RAY, "drain-node", f"--address={world.lab.ray_address}", f"--node-id={node}"),
        *("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test"),
        "--deadline-remaining-seconds=60",
    )
    assert done.returncode == 0, done.stdout + done.stderr
