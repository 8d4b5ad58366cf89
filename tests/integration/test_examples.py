"""An example, given a model and prompts that it was not written for, trains as it stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.contracts.config.file import load_config
from cluster.contracts.config.train import TrainConfig

pytestmark = pytest.mark.slow


def test_grpo_trains_a_random_model_with_values_chosen_here(
    world: Any, accord: Any, repo_root: Path
) -> None:
    command = accord.start(
        "train",
        str(repo_root / "examples" / "grpo.toml"),
        f"model.path={world.policy}",
        f"data.prompts={world.prompts}",
        f"reward.sources.0.path={repo_root / 'examples' / 'rewards.py'}:about_thirty_words",
        f"run.dir={accord.folder / 'runs'}",
        "run.name=r",
        "batch.steps=2",
        "rollout.max_tokens=auto",
    )
    assert command.wait(240) == 0, command.stderr
    assert command.left() == []
    run = accord.folder / "runs" / "r"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == [1, 2]
    stored = load_config(TrainConfig, str(run / "config.toml"))
    assert stored.rollout.max_tokens == 256  # of a context of 512
    assert {"dtype", "max_running", "kv_cache_mb", "cpus"} <= stored.rollout.model_fields_set
    assert (run / "policy" / "config.json").is_file()


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_what_init_writes_passes_plan(world: Any, accord: Any, algorithm: str) -> None:
    given = ("--model", world.policy, "--prompts", world.prompts, "--algorithm", algorithm)
    written = accord.run("init", *given)
    assert written.wait(0) == 0, written.stderr
    planned = accord.run("plan", f"{algorithm}.toml", "--json")
    assert planned.wait(0) == 0, planned.stderr
    shown = json.loads(planned.stdout)
    assert shown["config"]["rollout"]["max_tokens"] == 256
    assert shown["auto"]["rollout.max_tokens"]["why"].startswith("at most 256")
