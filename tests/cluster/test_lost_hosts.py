"""Real vLLM engines on three hosts that are scaled, killed, cut off and healed. The run goes on by
itself and every prompt is accounted for. Prints tokens per second before, during and after:

    pytest -s -m "lab and long" tests/cluster/test_lost_hosts.py
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from elastic_world import ROOM, World, prepared
from hosts import wait_until

pytestmark = [pytest.mark.lab, pytest.mark.long]

LONG_S = 300.0  # for an engine to start on a machine with much to do
CUT_S = 60.0


@dataclass
class Story:
    """What was done to a run, when, and how fast it was meanwhile."""

    world: World
    name: str
    command: Any
    marks: list[tuple[str, float]] = field(default_factory=list)

    def phase(self, what: str, *, steps: int = 4, at_least_s: float = 20.0) -> None:
        """The run trains so many steps more; its speed is told under this name."""
        self.marks.append((what, time.time()))
        goal, until = self.world.step(self.name) + steps, time.time() + at_least_s
        self.wait(lambda: self.world.step(self.name) >= goal and time.time() > until, what)
        self.marks.append(("", time.time()))

    def wait(self, reached: Any, what: str) -> float:
        """Seconds until it was reached. The run must live."""
        began = time.time()
        wait_until(lambda: reached() or self.command.poll() is not None, LONG_S, what)
        assert self.command.poll() is None, self.world.log(self.name).read_text()[-6000:]
        return time.time() - began

    def speeds(self) -> list[str]:
        said = []
        for (what, since), (_, until) in itertools.pairwise(self.marks):
            if what:
                rate, steps = self.world.tokens_per_s(self.name, since, until)
                said.append(
                    f"{what}: {rate:.0f} tokens per second trained, "
                    f"{steps} steps in {until - since:.0f} s"
                )
        return said


@pytest.mark.timeout(1800)
def test_a_run_outlives_scaling_a_killed_host_and_a_cut_network(
    make_lab: Any, tmp_path: Path
) -> None:
    pytest.importorskip("vllm", reason="vLLM has no build for this machine")
    said: list[str] = []
    with make_lab(3) as lab:
        world = prepared(lab, tmp_path)
        words = ("rollout.engine=vllm", "rollout.max_tokens=32", "staleness.bound=1")
        story = Story(world, "v", world.train("v", *words))
        story.wait(lambda: world.step("v") >= 2, "the first steps")
        story.phase("1 worker")
        for wanted in (3, 0, 2):
            said.append(world.accord("scale", "runs/v", wanted, f"--wait={LONG_S:.0f}"))
            if wanted:
                story.phase(f"{wanted} workers")

        killed = next(host for host in (2, 3) if host in world.workers_by_host("v"))
        cut = 5 - killed
        lab.kill(killed)
        took = story.wait(lambda: world.events("v", "worker_lost"), f"loss of host {killed}")
        took_all = took + story.wait(lambda: len(world.homes("v")) >= 2, "a replacement")
        said.append(f"host {killed} killed: noticed after {took:.0f} s, replaced {took_all:.0f} s")
        story.phase(f"2 workers, host {killed} dead")

        lab.cut(cut)
        story.phase(f"host {cut} cut off", steps=2, at_least_s=CUT_S)
        lab.heal(cut)
        story.phase(f"host {cut} healed")
        for host in (killed, cut):  # Ray ends itself on a host that it had given up
            lab.kill(host)
            lab.ray_join(host, cpus=3, words=(ROOM,))
        story.wait(lambda: len(world.homes("v")) >= 2, "two workers again")
        story.phase("all hosts back, 2 workers")

        said.append(world.accord("stop", "runs/v"))
        assert story.command.wait(120) == 0, world.log("v").read_text()[-6000:]
        said.append(world.accord("audit", "runs/v"))
        assert json.loads(world.accord("status", "runs/v", "--json"))["status"] == "stopped"
        for event in world.events(
            "v", "worker_serving", "worker_lost", "worker_not_joined", "worker_left"
        ):
            said.append(json.dumps(event))
        said += story.speeds()
        sys.stdout.write("\n".join(said) + "\n")
