"""One file for a whole pipeline: sections of other commands, and what the pipeline sets itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.contracts.config.file import check_config, dump_toml, load_config
from cluster.contracts.config.offline import DpoConfig
from cluster.contracts.config.pipeline import PipelineConfig
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import UserError

PROMPTS = {"data": {"prompts": "p.jsonl"}}
BASE: dict[str, Any] = {"model": {"path": "m"}, "sample": PROMPTS, "label": {"by": "people"}}
DPO = {**BASE, "dpo": {"fit": {"lr": 1e-5}}}
PPO = {**BASE, "reward_model": {}, "train": PROMPTS}
JUDGED = {**PROMPTS, "judge": {"sources": [{"type": "rules", "max_words": 9}]}}
BEST = {**BASE, "reward_model": {}, "best_of_n": PROMPTS, "best_of_n_sft": {}}


def checked(**tree: Any) -> PipelineConfig:
    return check_config(PipelineConfig, tree, where="test")


@pytest.mark.parametrize("tree", [DPO, PPO, BEST, {**DPO, "dpo": {}}, {**PPO, "evaluate": JUDGED}])
def test_the_stored_config_reads_as_what_it_was(tmp_path: Path, tree: dict[str, Any]) -> None:
    config = checked(**tree)
    file = tmp_path / "config.toml"
    file.write_text(dump_toml(config))
    assert load_config(PipelineConfig, str(file)) == config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dpo": None}, "give one of train, dpo and best_of_n"),
        ({"train": PROMPTS}, "there are train and dpo"),
        ({"reward_model": {}}, "leave reward_model out"),
        ({"dpo": {"model": {"path": "x"}}}, "dpo.model is set by the pipeline"),
        ({"dpo": {"data": {"path": "x"}}}, "dpo.data is set by the pipeline"),
        ({"dpo": {"run": {"name": "x"}}}, "dpo.run is set by the pipeline"),
        ({"dpo": {"fit": {"lrr": 1}}}, "unknown key dpo.fit.lrr: did you mean dpo.fit.lr?"),
        ({"dpo": {"beta": -1}}, "dpo.beta = -1: "),
        ({"dpo": {"loss": "kto", "reference_free": True}}, "dpo.reference_free cannot be set"),
        ({"evaluate": {**JUDGED, "policy": {"path": "x"}}}, "evaluate.policy is set by"),
        ({"evaluate": {**PROMPTS, "people": {"store": "p.db"}}}, "evaluate.people would wait"),
        ({"evaluate": {**JUDGED, "policies": ["a", "b"]}}, "evaluate.policies is set by"),
        ({"promote": {"min_win_rate": 0.6}}, "give [evaluate]"),
        ({"label": {"by": "simulated"}}, "by = 'simulated' needs annotate"),
        ({"label": {"by": "ai"}}, "by = 'ai' needs judge"),
        ({"label": {"annotate": "a.py:b"}}, "annotate belongs to by = 'simulated'"),
        ({"label": {"data": {"files": ["x"]}}}, "data.files is set by the pipeline"),
        ({"sft": {}}, "missing key sft.data"),
        ({"rounds": 0}, "rounds = 0"),
    ],
)
def test_bad_input_is_one_message(change: dict[str, Any], said: str) -> None:
    tree = {key: value for key, value in {**DPO, **change}.items() if value is not None}
    with pytest.raises(UserError) as told:
        checked(**tree)
    assert said in str(told.value)


def test_training_with_a_reward_needs_its_model() -> None:
    with pytest.raises(UserError, match="train needs a reward: give"):
        checked(**{**BASE, "train": {**PROMPTS, "reward": JUDGED["judge"]}})
    with pytest.raises(UserError, match="best_of_n and best_of_n_sft belong together"):
        checked(**{**BASE, "reward_model": {}, "best_of_n": PROMPTS})


def test_all_mistakes_come_at_once() -> None:
    with pytest.raises(UserError) as told:
        checked(**{**BASE, "dpo": {"model": {"path": "x"}, "beta": -1}, "sft": {"fit": {}}})
    for said in ("dpo.model is set", "dpo.beta = -1", "missing key sft.data"):
        assert said in str(told.value)


def test_the_reward_model_of_the_round_is_the_reward() -> None:
    values = {"model": {"path": "start"}}
    alone = checked(**PPO).of_stage(TrainConfig, "train", values, "rm")
    assert [source.model_dump()["path"] for source in alone.reward.sources] == ["rm"]
    assert alone.model.path == "start"
    sources = [
        {"type": "rules", "max_words": 9},
        {"type": "model", "weight": 2.0, "combine": "minimum"},
    ]
    tree = {**PPO, "train": {**PROMPTS, "reward": {"sources": sources}}}
    beside = checked(**tree).of_stage(TrainConfig, "train", values, "rm").reward.sources
    assert [source.type for source in beside] == ["rules", "model"]
    assert beside[1].model_dump() == beside[1].model_dump() | {"path": "rm", "weight": 2.0}


def test_a_value_is_filled_beside_what_the_section_says() -> None:
    config = checked(**DPO)
    values = {"model": {"path": "start"}, "data.path": "labels"}
    stage = config.of_stage(DpoConfig, "dpo", values)
    assert (stage.model.path, stage.data.path, stage.fit.lr) == ("start", "labels", 1e-5)
    assert config.dpo == {"fit": {"lr": 1e-5}}
