"""The quickstart is a pipeline: its config is one of `accord pipeline`, at every size."""

from __future__ import annotations

import tomllib

import pytest

from cluster.contracts.config.file import check_config, dump_toml
from cluster.contracts.config.pipeline import PipelineConfig
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import UserError
from cluster.quickstart.settings import QuickstartConfig, pipeline_config


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_it_is_one_round_that_is_always_promoted(scale: float) -> None:
    config = pipeline_config(QuickstartConfig.of(3, scale, 0.0), "runs", "q")
    assert (config.rounds, config.run.seed, config.promote.min_win_rate) == (1, 3, 0.0)
    train = config.of_stage(TrainConfig, "train", {"model": {"path": "m"}}, "rm")
    assert train.algorithm.kl.coef == 0.0
    assert train.batch.steps == max(3, round(40 * scale))
    stored = tomllib.loads(dump_toml(config))
    assert check_config(PipelineConfig, stored, where="stored") == config


@pytest.mark.parametrize("scale", [0.0, 11.0, -1.0])
def test_a_size_out_of_range_is_refused(scale: float) -> None:
    with pytest.raises(UserError, match=r"not from 0\.01 to 10"):
        QuickstartConfig.of(0, scale, None)
