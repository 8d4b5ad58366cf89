"""The host of Ray's head is lost, while driver, learner and worker are on others. The times that it
takes are logged:

    pytest -m "lab and long" tests/cluster/test_head_lost.py -o log_cli=true --log-cli-level=INFO
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from given import CONFIG, events, write_inputs
from hosts import ROOT, Lab, wait_until

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(1500)]

log = logging.getLogger(__name__)
DRIVER, OTHER = 2, 3
ENDS_S = 300.0
# Ray looks for its node among all processes, and prefers the head's. All hosts of a lab share one
# table of processes, so a driver that is not on the head's host has to say where it is.
HERE = """
import functools, runpy, sys, ray
ray.init = functools.partial(ray.init, _node_ip_address=sys.argv[1])
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def ray_is_up(lab: Lab) -> None:
    lab.ray_head(cpus=1)
    lab.ray_join_all(
        {
            DRIVER: ('--resources={"learner": 1}',),
            OTHER: ('--resources={"rollout": 2, "reward": 1}',),
        }
    )


def command_of(lab: Lab, *words: str) -> tuple[str | Path, ...]:
    return (sys.executable, "-c", HERE, lab.address(DRIVER), ROOT / "launch.py", *words)


def accord(lab: Lab, *words: str) -> subprocess.CompletedProcess[str]:
    return lab.run(DRIVER, *command_of(lab, *words), timeout_s=ENDS_S, ACCORD_NO_BOOTSTRAP="1")


def test_the_host_of_the_head_is_lost_and_the_run_goes_on_with_a_new_one(
    make_lab: Any, tmp_path: Path
) -> None:
    with make_lab(3) as lab:
        folder = lab.disk(DRIVER)
        write_inputs(folder)
        config = CONFIG.format(engine="transformers", steps=100_000, name="r")
        (folder / "train.toml").write_text(config)
        ray_is_up(lab)
        run, out = folder / "runs" / "r", tmp_path / "train.log"
        words = command_of(lab, "train", "train.toml")
        command = lab.start(DRIVER, *words, out=out, ACCORD_NO_BOOTSTRAP="1")
        wait_until(
            lambda: any((run / "checkpoints").glob("step-*")) or command.poll() is not None,
            300,
            "a checkpoint",
        )
        assert command.poll() is None, out.read_text()

        lab.kill(1)
        killed = time.monotonic()
        wait_until(lambda: command.poll() is not None, ENDS_S, "the command to end")
        said = out.read_text()
        log.info("ended %.1f s after the head was killed\n%s", time.monotonic() - killed, said)
        assert command.poll() == 75, said
        assert "the cluster's head is lost" in said
        assert "accord train --resume" in said
        assert events(run, "head_lost")

        for host in (DRIVER, OTHER):  # what is left of the old cluster
            lab.kill(host)
        ray_is_up(lab)
        metrics = (run / "metrics.jsonl").read_text().splitlines()
        more = max(json.loads(line)["step"] for line in metrics) + 2
        resumed = accord(lab, "train", "--resume", "runs/r", f"batch.steps={more}")
        assert resumed.returncode == 0, resumed.stdout + resumed.stderr
        log.info(resumed.stdout + resumed.stderr)
        audit = accord(lab, "audit", "runs/r")
        log.info(audit.stdout)
        assert audit.returncode == 0, audit.stdout + audit.stderr
