"""Faults of the table in docs/fault-model.md on one run with real vLLM engines: none ends it, and
every prompt is accounted for."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.contracts.config.reward import RewardConfig, RulesSource
from cluster.runs.audit import audit_run
from cluster.runs.rows import Follower
from reward_service.access import Access
from reward_service.server import RunningServer, serve

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1500)]

# In each worker's process: where the folder has a file `die`, vLLM's own engine raises at its next
# step (and only one takes the file); a prompt of more than 60 tokens kills the process.
PLUGIN = """
import os
from pathlib import Path

FOLDER = Path("{folder}")

if b"RolloutActor" in Path("/proc/self/cmdline").read_bytes():
    from actors.engine_thread import EngineThread

    made = EngineThread.__init__

    def init(self, make_engine, *others):
        def make():
            engine = make_engine()
            step, submit = engine._llm.step, engine.submit

            def dying_step():
                try:
                    (FOLDER / "die").unlink()
                except FileNotFoundError:
                    return step()
                raise RuntimeError("EngineCore encountered an issue")

            def poisoned(request_id, prompt, *more):
                if len(prompt) > 60:
                    os.kill(os.getpid(), 9)
                return submit(request_id, prompt, *more)

            engine._llm.step, engine.submit = dying_step, poisoned
            return engine

        made(self, make, *others)

    EngineThread.__init__ = init
"""
LONG_S = 400


class Watched:
    """The run, and its newest events."""

    def __init__(self, run: Path, command: Any) -> None:
        self.run = run
        self.command = command

    def events(self, kind: str) -> list[dict[str, Any]]:
        rows = Follower(self.run / "events.jsonl", 1 << 30).new_rows()
        return [row for row in rows if row["kind"] == kind]

    def step(self) -> int:
        rows = Follower(self.run / "metrics.jsonl", 1 << 30).new_rows()
        return max((row["step"] for row in rows), default=0)

    def until(self, reached: Callable[[], Any], what: str) -> None:
        self.command.wait_until(reached, LONG_S, what)

    def until_more(self, kind: str, than: int) -> None:
        self.until(lambda: len(self.events(kind)) > than, f"{kind} number {than + 1}")

    def waits_for_rewards(self) -> bool:
        """Nothing else can go on: all that is in flight is generated."""
        live = json.loads((self.run / "live.json").read_text())
        waiting: int = live["rewards"]["waiting"]
        return 0 < waiting == live["queue"]["in_flight"]

    def goes_on(self, steps: int = 3) -> None:
        """Steps follow, and both workers serve again."""
        goal = self.step() + steps
        self.until(lambda: self.step() >= goal, f"step {goal}")
        self.until(lambda: self.serving() == 2, "two workers to serve")

    def serving(self) -> int:
        live = json.loads((self.run / "live.json").read_text())
        return sum(worker["status"] == "serving" for worker in live["workers"])

    def workers(self) -> list[psutil.Process]:
        def is_worker(process: psutil.Process) -> bool:
            try:
                return "RolloutActor" in " ".join(process.cmdline())
            except psutil.Error:
                return False

        below = psutil.Process(self.command.process.pid).children(recursive=True)
        return [process for process in below if is_worker(process)]


def scorer(port: int = 0) -> RunningServer:
    return serve(RewardConfig(sources=[RulesSource(max_words=5)]), port=port, access=Access())


def test_a_run_with_vllm_survives_its_faults(world: Any, accord: Any) -> None:
    pytest.importorskip("vllm", reason="vLLM has no build for this machine")
    folder = accord.folder
    (folder / "faults.py").write_text(PLUGIN.format(folder=folder))
    prompts = world.prompts.read_text().splitlines()
    prompts.insert(9, json.dumps({"prompt": "battery " * 80}))
    (folder / "p.jsonl").write_text("\n".join(prompts) + "\n")
    service = scorer()
    config = world.train_toml(
        folder / "c.toml",
        'type = "rules"\nmax_words = 5',
        data=f'prompts = "{folder}/p.jsonl"',
        batch="prompts_per_step = 4\nsamples_per_prompt = 2\nsteps = 100000",
        rollout='engine = "vllm"\nworkers = 2\nmax_tokens = 24\nstall_timeout_s = 15\n'
        "max_restarts = 100",
        staleness="bound = 2",
        checkpoint="every = 5",
        cluster="object_store_mb = 120",
    )
    reward = f'[reward]\noutage_s = 600\naddress = "{service.address}"\n'
    config.write_text(f'plugins = ["{folder}/faults.py"]\n{reward}{config.read_text()}')
    command = accord.start("train", config)
    seen = Watched(folder / "runs" / "r", command)

    seen.until(lambda: seen.events("prompt_set_aside"), "the poisoned prompt to be set aside")  # 17
    seen.goes_on()

    lost = len(seen.events("worker_lost"))
    seen.workers()[0].kill()  # 1
    seen.until_more("worker_lost", lost)
    seen.goes_on()

    lost = len(seen.events("worker_lost"))
    (folder / "die").touch()  # 2
    seen.until_more("worker_lost", lost)
    assert "EngineCore encountered an issue" in seen.events("worker_lost")[-1]["cause"]
    assert seen.events("worker_lost")[-1]["fault"] == "engine"
    seen.goes_on()

    lost = len(seen.events("worker_lost"))
    hung = seen.workers()[0]
    hung.send_signal(signal.SIGSTOP)  # 3
    seen.until_more("worker_lost", lost)
    with suppress(psutil.NoSuchProcess):
        hung.send_signal(signal.SIGCONT)
    seen.goes_on()

    port = int(service.address.rpartition(":")[2])
    lost = len(seen.events("worker_lost"))
    service.stop()  # 4
    seen.until(seen.waits_for_rewards, "the run to wait for scores")
    service = scorer(port)
    seen.goes_on()
    assert len(seen.events("worker_lost")) == lost, "completions wait for their scores"

    for count in (1, 2, 0, 2):  # 11
        scaled = accord.run("scale", seen.run, count, "--wait=300", timeout_s=LONG_S)
        assert scaled.process.returncode == 0, scaled.stderr
    seen.goes_on()

    command.process.send_signal(signal.SIGTERM)  # 19
    assert command.wait(120) == 143, command.stderr
    assert command.left() == []
    steps = audit_run(str(seen.run)).steps
    again = accord.run("train", "--resume", seen.run, f"batch.steps={steps + 3}", timeout_s=LONG_S)
    assert again.process.returncode == 0, again.stderr
    service.stop()

    audit = audit_run(str(seen.run))
    assert audit.violations == []
    assert audit.steps == steps + 3
    assert audit.trained + audit.dropped.total() == audit.issued == audit.steps * 4


def test_replies_that_ray_loses_count_once(
    world: Any, accord: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray did what was asked, and its answer is lost on the way, again and again: at most the
    process that gave it is replaced."""
    lossy = {"num_failures": -1, "req_failure_prob": 0, "resp_failure_prob": 1}
    calls = {"CoreWorkerService.grpc_client.PushTask": lossy}
    monkeypatch.setenv("RAY_testing_rpc_failure", json.dumps(calls))
    config = world.train_toml(
        accord.folder / "c.toml",
        'type = "rules"\nmax_words = 5',
        batch="prompts_per_step = 4\nsamples_per_prompt = 2\nsteps = 60",
        rollout='engine = "transformers"\nworkers = 2\nmax_tokens = 6\nmax_restarts = 100',
        learner="max_restarts = 100",
        staleness="bound = 2",
    )
    command = accord.start("train", config)
    assert command.wait(LONG_S) == 0, command.stderr
    audit = audit_run(str(accord.folder / "runs" / "r"))
    assert audit.violations == []
    assert (audit.steps, audit.trained, audit.in_flight) == (60, 240, 0)
