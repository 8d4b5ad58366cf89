"""What a resume refuses, because it changes what is learnt, and what it takes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.assembly.learnt_from import learnt_from, refuse_other_origins
from cluster.assembly.resume_rules import FREE_ON_RESUME, refuse_other_horizon
from cluster.assembly.run_session import refuse_changes
from cluster.contracts.config.file import check_config, put
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import UserError
from cluster.contracts.records import Prompt


def config_of(folder: Path, **changes: Any) -> TrainConfig:
    tree: dict[str, Any] = {
        "model": {"path": str(folder / "model")},
        "data": {"prompts": "p.jsonl"},
        "reward": {
            "sources": [
                {"type": "function", "path": f"{folder}/reward.py:score"},
                {"type": "model", "path": str(folder / "judge"), "name": "judge"},
            ]
        },
        "learner": {"reference_path": str(folder / "reference"), "value_model": "own"},
    }
    for key, value in changes.items():
        put(tree, key.replace("__", "."), value)
    return check_config(TrainConfig, tree, where="test")


def prepared_of(folder: Path, texts: tuple[str, ...] = ("a", "b")) -> Any:
    prompts = [
        Prompt(id=str(i), messages=({"role": "user", "content": t},), token_ids=(i,))
        for i, t in enumerate(texts)
    ]
    return SimpleNamespace(
        config=config_of(folder),
        prompts=SimpleNamespace(all=lambda: tuple(prompts)),
        held_out=(),
    )


@pytest.fixture
def world(tmp_path: Path) -> Path:
    for name in ("model", "judge", "reference"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
    (tmp_path / "reward.py").write_text("import json\nfrom words import good\ndef score(): ...\n")
    (tmp_path / "words.py").write_text("import deeper.rules\ngood = 1\n")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "__init__.py").write_text("")
    (tmp_path / "deeper" / "rules.py").write_text("limit = 1\n")
    (tmp_path / "other.py").write_text("nothing imports this\n")
    return tmp_path


CHANGES = {
    "reward.py": "reward function",
    "words.py": "reward function",
    "deeper/rules.py": "reward function",
    "judge/model.safetensors": "reward judge",
    "model/model.safetensors": "model (",
    "reference/model.safetensors": "reference model (",
}


@pytest.mark.parametrize("file", CHANGES)
def test_other_content_behind_the_same_path_is_refused(world: Path, file: str) -> None:
    prepared = prepared_of(world)
    before = learnt_from(prepared)
    path = world / file
    path.write_bytes(path.read_bytes() + b"\n# another\n")
    with pytest.raises(UserError, match="not what the run began with") as caught:
        refuse_other_origins(before, learnt_from(prepared), prepared.config, world)
    assert f"began with: {CHANGES[file]}" in str(caught.value)


def test_other_prompts_as_many_as_before_are_refused(world: Path) -> None:
    before = learnt_from(prepared_of(world))
    now = learnt_from(prepared_of(world, ("a", "c")))
    with pytest.raises(UserError, match=r"prompts \(p\.jsonl\)"):
        refuse_other_origins(before, now, prepared_of(world).config, world)


def test_what_is_not_learnt_from_may_change(world: Path) -> None:
    before = learnt_from(prepared_of(world))
    (world / "other.py").write_text("changed\n")
    (world / "model" / ".cache").write_text("hidden\n")
    moved = world / "elsewhere"
    moved.mkdir()
    for name in ("model", "judge", "reference", "reward.py", "words.py", "deeper"):
        (world / name).rename(moved / name)
    prepared = prepared_of(moved)
    refuse_other_origins(before, learnt_from(prepared), prepared.config, world)
    refuse_other_origins(None, learnt_from(prepared), prepared.config, world)  # an older Accord


@pytest.mark.parametrize(
    "changes",
    [
        {"rollout__stall_timeout_s": 5, "rollout__workers": 3, "rollout__max_restarts": 9},
        {"learner__processes": 2, "learner__tokens_per_microbatch": 64, "learner__cpus": 3},
        {"reward__deadline_s": 5, "weights__transport": "disk", "checkpoint__every_s": 60},
        {"cluster__address": "10.0.0.1:6379", "batch__steps": 900},
    ],
)
def test_what_operations_need_is_taken(tmp_path: Path, changes: dict[str, Any]) -> None:
    refuse_changes(config_of(tmp_path), config_of(tmp_path, **changes), "run", FREE_ON_RESUME)
    refuse_other_horizon(config_of(tmp_path), config_of(tmp_path, **changes), "run")


@pytest.mark.parametrize(
    "changes",
    [{"learner__lr": 0.5}, {"batch__samples_per_prompt": 2}, {"rollout__temperature": 0.5}],
)
def test_what_changes_the_learning_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="cannot change on resume"):
        refuse_changes(config_of(tmp_path), config_of(tmp_path, **changes), "run", FREE_ON_RESUME)


def test_a_schedule_that_ends_with_the_run_fixes_its_number_of_steps(tmp_path: Path) -> None:
    """A factor of 0.05 once jumped to 0.50 when a run was resumed with more steps."""
    before = config_of(tmp_path, learner__schedule="linear", batch__steps=100)
    after = config_of(tmp_path, learner__schedule="linear", batch__steps=200)
    with pytest.raises(UserError, match=r"batch\.steps cannot change from 100 to 200"):
        refuse_other_horizon(before, after, "run")
    refuse_other_horizon(before, before, "run")
