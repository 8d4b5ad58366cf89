"""Only the host of the command has the files: learner, workers and reward service are on others.

All paths in the config are relative to the folder of the command, which no other host has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from given import CONFIG, accord, events, write_inputs

pytestmark = pytest.mark.lab


def sent(disk: Path) -> list[str]:
    """What lies in the cache of a host."""
    return sorted(path.name for path in disk.parent.glob("tmp/accord-*/parcels/*"))


def test_a_run_whose_files_are_on_one_host_and_a_host_that_is_refused(make_lab: Any) -> None:
    from transformers import AutoModelForCausalLM

    from cluster.runs.run import Run

    with make_lab(3) as lab:
        write_inputs(lab.disk(1))
        config = CONFIG.format(engine="transformers", steps=2, name="r")
        (lab.disk(1) / "train.toml").write_text(config)
        lab.ray_head(cpus=0)
        learner, others = '--resources={"learner": 1}', '--resources={"rollout": 2, "reward": 1}'
        # Later another torch is in this folder, which no host has yet.
        lab.ray_join_all({2: (learner,), 3: (others,)}, PYTHONPATH="/host/other")

        done = accord(lab, "train", "train.toml")
        assert done.returncode == 0, done.stdout + done.stderr
        run = Run(lab.disk(1) / "runs" / "r")
        assert run.checkpoints.newest_good().state.step == 2
        AutoModelForCausalLM.from_pretrained(run.path / "policy")

        packed = {e["role_and_path"]: e["bytes"] for e in events(run.path, "input_packed")}
        names = {place.replace(str(Path("/host")), "").replace("/", "") for place in packed}
        assert names == {
            *("worker: model", "learner: model", "learner: reference"),
            *("learner: reward_model", "learner: chat.jinja"),
            *("reward: rewards", "reward: reward_model"),
        }
        assert packed["reward: /host/rewards"] < 1 << 10, "only Python files"
        weights = (lab.disk(1) / "model" / "model.safetensors").stat().st_size
        assert packed["learner: /host/model"] - packed["worker: /host/model"] == weights
        for host in (2, 3):
            assert [path.name for path in lab.disk(host).iterdir()] == ["home"]
            assert sent(lab.disk(host)) == [], "the files of the run are gone with it"

        # A host with another torch is named before anything starts.
        other = lab.disk(3) / "other" / "torch-1.0.0.dist-info"
        other.mkdir(parents=True)
        (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0.0\n")
        done = accord(lab, "train", "train.toml", "run.name=other")
        assert done.returncode == 2, done.stdout + done.stderr
        said = done.stdout + done.stderr
        assert f"host3 ({lab.address(3)}): torch 1.0.0 instead of " in said
        assert "host2" not in said
        assert "Traceback" not in said
