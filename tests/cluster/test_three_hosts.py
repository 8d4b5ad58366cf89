"""Learner on host 1, real vLLM workers on hosts 2 and 3, links of 100 Mbit/s, nothing shared but
the installed environment: a run to its end. It logs what the command prints and what each update of
the weights took:

    pytest -m "lab and long" tests/cluster/test_three_hosts.py -o log_cli=true --log-cli-level=INFO
"""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from given import CONFIG, accord, events, write_inputs

pytestmark = [pytest.mark.lab, pytest.mark.long]

log = logging.getLogger(__name__)
STEPS = 4


def test_a_run_with_vllm_workers_on_two_other_hosts(make_lab: Any) -> None:
    from transformers import AutoModelForCausalLM

    from cluster.runs.run import Run

    pytest.importorskip("vllm", reason="vLLM has no build for this machine")
    with make_lab(3) as lab:
        write_inputs(lab.disk(1), hidden=256, layers=6, heads=4, intermediate=768)
        config = CONFIG.format(engine="vllm", steps=STEPS, name="r")
        (lab.disk(1) / "train.toml").write_text(config)
        lab.ray_head(words=('--resources={"learner": 1, "reward": 1}',))
        lab.ray_join_all(dict.fromkeys((2, 3), ('--resources={"rollout": 1}',)))
        for host in (1, 2, 3):
            lab.rate(host, 100)

        done = accord(lab, "train", "train.toml")
        assert done.returncode == 0, done.stdout + done.stderr
        log.info(done.stdout + done.stderr)
        run = Run(lab.disk(1) / "runs" / "r")
        found = run.checkpoints.newest_good()
        assert (found.state.step, found.passed_over) == (STEPS, {})
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
        done = accord(lab, "audit", "runs/r")
        log.info(done.stdout + done.stderr)
        assert done.returncode == 0, done.stdout + done.stderr
