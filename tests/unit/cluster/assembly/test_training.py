"""What a person reads in front of the progress of a run: the algorithm's own name. And a resume of
a run with nothing left to train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.assembly.training_resume import resume_training
from cluster.assembly.training_run import algorithm_title
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import UserError
from cluster.contracts.records import RunState
from cluster.runs.console import Reporter
from cluster.runs.run import Run
from tests.checkpoint_files import write_checkpoint

TITLES = [
    ({"advantage": "gae"}, "PPO"),
    ({"advantage": "grpo"}, "GRPO"),
    ({"advantage": "rloo"}, "RLOO"),
    ({"advantage": "reinforce++"}, "REINFORCE++"),
    ({"advantage": "grpo", "loss": "cispo"}, "GRPO with loss cispo"),
]


@pytest.mark.parametrize(("algorithm", "title"), TITLES)
def test_the_title_is_the_algorithm(algorithm: dict[str, Any], title: str) -> None:
    assert algorithm_title(config_with(algorithm=algorithm)) == title


def config_with(**sections: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {"prompts": "p.jsonl"},
            "reward": {"sources": [{"type": "rules", "max_words": 5}]},
            **sections,
        }
    )


def test_a_run_killed_between_its_last_checkpoint_and_its_policy_gets_its_policy(
    tmp_path: Path, tiny: Path
) -> None:
    config = config_with(model={"path": str(tiny)}, batch={"steps": 3})
    run = Run.create(str(tmp_path), "r", "train", config)
    staging = run.checkpoints.begin(3)
    state = RunState(step=3, version=3, next_group=192, prompts_total=9)
    run.checkpoints.commit(staging, write_checkpoint(staging), state, 1)
    assert resume_training(str(run.path), [], Reporter(quiet=True)) == run.path
    assert (run.path / "policy" / "model.safetensors").is_file()
    assert json.loads((run.path / "manifest.json").read_text())["status"] == "finished"
    with pytest.raises(UserError, match=r"has done its 3 steps\n  fix: ask for more"):
        resume_training(str(run.path), [], Reporter(quiet=True))
