"""Learner on host 1, real vLLM workers on hosts 2 and 3, links of 100 Mbit/s, nothing shared but
the installed environment; a Python reward and a reward model that `accord reward-model` trained. A
run to its end, and the same as a Ray job that is stopped and continued. It logs what the commands
print, what each update of the weights took, and what `ray job stop` left:

    pytest -m "lab and long" tests/cluster/test_three_hosts.py -o log_cli=true --log-cli-level=INFO
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from given import CONFIG, accord, events, train_reward_model, write_inputs
from hosts import ROOT, Lab, hosts, wait_until

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(1500)]

log = logging.getLogger(__name__)
STEPS = 4
RAY = Path(sys.executable).with_name("ray")
DASHBOARD = "--address=http://127.0.0.1:8265"
PATIENT = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    pytest.importorskip("vllm", reason="vLLM has no build for this machine")
    with hosts(3) as lab:
        work = lab.disk(1) / "work"
        write_inputs(work, hidden=256, layers=6, heads=4, intermediate=768)
        train_reward_model(lab, work)
        head = ('--resources={"learner": 1, "reward": 1}', "--dashboard-host=127.0.0.1")
        lab.ray_head(words=head)
        lab.ray_join_all(dict.fromkeys((2, 3), ('--resources={"rollout": 1}',)))
        for host in (1, 2, 3):
            lab.rate(host, 100)
        yield lab


def write_config(lab: Lab, name: str, *, steps: int, every: int = 1) -> Path:
    text = CONFIG.format(engine="vllm", steps=steps, name=name).replace("every = 1", f"{every = }")
    path = lab.disk(1) / "work" / f"{name}.toml"
    path.write_text(text)
    return path


def test_a_run_with_vllm_workers_on_two_other_hosts(lab: Lab) -> None:
    write_config(lab, "r", steps=STEPS)
    done = accord(lab, "train", "r.toml", "run.dir=/host/runs", folder="work")
    assert done.returncode == 0, done.stdout + done.stderr
    log.info(done.stdout + done.stderr)
    proven(lab, "r", STEPS)


def test_the_same_as_a_job_that_is_stopped_and_continued(lab: Lab) -> None:
    """With Ray's three seconds, and with RAY_JOB_STOP_WAIT_TIME_S."""
    write_config(lab, "j", steps=100_000, every=100_000)
    first = submit(lab, "first", "train", "j.toml", "run.dir=/host/runs")
    wait_for_step(lab, 2, "first")
    log.info("within Ray's 3 s: %s", stop(lab, first))
    # Whatever is left: the next job goes on from there.
    run = lab.disk(1) / "runs" / "j"
    goal = step_of(run) + 2
    second = submit(lab, "second", "train", "--resume", "/host/runs/j", environment=PATIENT)
    wait_for_step(lab, goal, "second")
    said = stop(lab, second)
    log.info("with RAY_JOB_STOP_WAIT_TIME_S=60: %s", said)
    reached = step_of(run)
    assert said["saved"] == reached, said

    third = submit(
        lab, "third", "train", "--resume", "/host/runs/j", f"batch.steps={reached + 2}"
    )  # to its end
    state = wait_until(lambda: ended(lab, third), 300, "the job's end", every_s=2)
    assert state == "succeeded", job(lab, "logs", third)
    proven(lab, "j", reached + 2)


def proven(lab: Lab, name: str, steps: int) -> None:
    """Checkpoints are verified, the policy loads, workers were on two hosts, books are exact."""
    from transformers import AutoModelForCausalLM

    from cluster.runs.run import Run

    run = Run(lab.disk(1) / "runs" / name)
    found = run.checkpoints.newest_good()
    assert (found.state.step, found.passed_over) == (steps, {})
    policy = AutoModelForCausalLM.from_pretrained(run.path / "policy")
    serving = events(run.path, "worker_serving")
    assert all(event["engine"].startswith("vllm") for event in serving)
    assert len({event["node"] for event in serving}) == 2, "one worker on each of two hosts"

    size = sum(p.numel() for p in policy.parameters())
    for row in map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines()):
        took = {key: row[key] for key in row if key.startswith("weight_sync/")}
        log.info("%.1f million parameters to 2 hosts: %s", size / 1e6, took)
    for event in events(run.path, "checkpoint"):
        log.info(event)
    done = accord(lab, "audit", f"runs/{name}")
    log.info(done.stdout + done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr


# -- jobs ------------------------------------------------------------------------------------------


def submit(lab: Lab, name: str, *words: str, environment: dict[str, Any] | None = None) -> str:
    """`ray job submit` of an `accord` command in a copy of /host/work; the job's name."""
    options = ["--working-dir=/host/work", "--no-wait", f"--submission-id={name}"]
    if environment is not None:
        options.append(f"--runtime-env-json={json.dumps(environment)}")
    command = (sys.executable, str(ROOT / "launch.py"), *words)
    job(lab, "submit", *options, "--", *command)
    return name


def job(lab: Lab, verb: str, *words: str) -> str:
    done = lab.run(1, RAY, "job", verb, DASHBOARD, *words, ACCORD_NO_BOOTSTRAP="1")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def ended(lab: Lab, name: str) -> str | None:
    """How the job has ended, None while it goes on."""
    said = job(lab, "status", name)
    return next((end for end in ("succeeded", "failed", "was stopped") if end in said), None)


def stop(lab: Lab, name: str) -> dict[str, Any]:
    """What `ray job stop` left: the steps trained, the step saved, seconds to the last event."""
    run, began = lab.disk(1) / "runs" / "j", time.time()
    job(lab, "stop", name)
    saved = [event["step"] for event in events(run, "checkpoint") if event["time"] >= began]
    last = max((event["time"] for event in events(run, "checkpoint")), default=0.0)
    return {
        "trained": step_of(run),
        "saved": max(saved, default=None),
        "seconds": round(last - began, 1) if last > began else None,
    }


def step_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    rows = path.read_text().splitlines() if path.is_file() else []
    return max((json.loads(row)["step"] for row in rows), default=0)


def wait_for_step(lab: Lab, goal: int, name: str) -> None:
    run, told = lab.disk(1) / "runs" / "j", 0.0

    def reached() -> bool:
        nonlocal told
        if time.monotonic() > told + 10:  # asking costs a process
            told = time.monotonic()
            assert ended(lab, name) is None, job(lab, "logs", name)[-6000:]
        return step_of(run) >= goal

    wait_until(reached, 300, f"step {goal} of job {name}")
