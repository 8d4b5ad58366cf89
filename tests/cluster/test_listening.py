"""Every socket that listens on the hosts of a joined cluster is in SECURITY.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from given import CONFIG, write_inputs
from hosts import ROOT, Lab, hosts, wait_until

from tests.integration.listening import JOINED, Listener, rows_of

pytestmark = [pytest.mark.lab, pytest.mark.long]

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
LOOK = """
import json, sys
from dataclasses import asdict
from tests.integration.listening import listeners_among
print(json.dumps([asdict(one) for one in listeners_among(map(int, sys.argv[1:]))]))
"""


def listening(lab: Lab, host: int) -> list[Listener]:
    """Looked at from within the host: the kernel shows each network its own sockets only."""
    done = lab.run(host, sys.executable, "-c", LOOK, *lab.pids(host), PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    return [Listener(**one) for one in json.loads(done.stdout.splitlines()[-1])]


def answer_without_token(lab: Lab, one: Listener) -> str:
    """The HTTP status that host 2 gets."""
    url = f"http://{one.host}:{one.port}/"
    done = lab.run(2, "curl", "-s", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}", url)
    return done.stdout


def test_every_socket_of_a_head_and_of_a_joined_host_is_listed() -> None:
    known = rows_of((ROOT / "SECURITY.md").read_text(encoding="utf-8"), JOINED)
    with hosts(2) as lab:
        write_inputs(lab.disk(1))
        text = CONFIG.format(engine="transformers", steps=100000, name="r")
        (lab.disk(1) / "train.toml").write_text(text)
        lab.ray_head(words=('--resources={"learner": 1, "rollout": 1}',))
        lab.ray_join(2, words=('--resources={"reward": 1, "rollout": 1}',))
        log = lab.disk(1) / "log"
        command = (sys.executable, ROOT / "launch.py", "train", "train.toml")
        process = lab.start(1, *command, out=log, ACCORD_NO_BOOTSTRAP="1")
        metrics: Path = lab.disk(1) / "runs" / "r" / "metrics.jsonl"
        wait_until(lambda: metrics.is_file() or process.poll() is not None, 300, "a step")
        assert process.poll() is None, log.read_text()
        found = {host: listening(lab, host) for host in (1, 2)}
        for host, role in ((1, "launch.py"), (2, "ray::_RewardActor"), (2, "raylet")):
            assert role in {one.process for one in found[host]}, found[host]
        own = lab.address(1)
        agents = [one for one in found[1] if one.process in AGENTS and str(one.host) == own]
        answers = {one: answer_without_token(lab, one) for one in agents}
        addresses = {host: lab.address(host) for host in found}
    for host, node in addresses.items():
        unknown = [one for one in found[host] if not any(row.allows(one, node) for row in known)]
        assert unknown == [], f"host {host}"
    assert {one.process for one in answers} == set(AGENTS)
    assert set(answers.values()) <= {"401", "403"}, answers
