"""`accord plan --gpus`: bytes by purpose, what does not fit, what to change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.assembly.model_facts import ModelFacts, facts_of
from cluster.contracts.config.lora import LoraConfig
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import UserError
from cluster.measure.fits import fit_lines, fit_on, shapes
from cluster.measure.sizes import learner_sizes

ROOT = Path(__file__).resolve().parents[4]
GB = 1 << 30


def model(name: str) -> ModelFacts:
    return facts_of(json.loads((ROOT / f"examples/shapes/{name}.json").read_text("utf-8")))


def config(**learner: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": {"path": "./m", "dtype": "bfloat16"},
            "data": {"prompts": "p.jsonl"},
            "reward": {"sources": [{"type": "rules"}]},
            "learner": {
                "gradient_checkpointing": True,
                "tokens_per_microbatch": 16384,
                **learner,
            },
        }
    )


def sharded(processes: int, **learner: Any) -> TrainConfig:
    return config(processes=processes, sharding="fsdp2", **learner)


@pytest.mark.parametrize(
    ("name", "billions"), [("qwen2_7b", 7.6), ("qwen2_32b", 32.8), ("llama_70b", 70.6)]
)
def test_the_shapes_of_the_examples_are_of_their_size(name: str, billions: float) -> None:
    facts = model(name)
    assert facts.parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert facts.layers * facts.layer_parameters + facts.outer_parameters == facts.parameters
    # peft's count for r = 16 on all linear layers of the 7B is 40.4 million.
    assert model("qwen2_7b").adapter_parameters(16) == pytest.approx(40.4e6, rel=0.01)


def test_what_stays_of_ppo_with_a_reference_is_18_bytes_a_parameter_shared_by_all() -> None:
    facts = model("qwen2_7b")
    kept = ("weights", "gradients", "moments of the optimiser", "reference")
    for processes in (4, 8):
        sizes = learner_sizes(sharded(processes), facts).device
        total = sum(sizes[name] for name in kept)
        assert total == pytest.approx(18 * facts.parameters / processes)
    light = learner_sizes(sharded(8, optimizer="adamw8bit"), facts).device
    assert sum(light[name] for name in kept) == pytest.approx(12 * facts.parameters / 8)


def test_what_is_offloaded_is_counted_at_the_host() -> None:
    facts = model("qwen2_7b")
    plain = learner_sizes(sharded(4), facts)
    for kinds, moved in (
        (["optimizer"], {"moments of the optimiser"}),
        (["reference", "activations"], {"reference", "activations kept"}),
    ):
        sizes = learner_sizes(sharded(4, offload=kinds), facts)
        assert sizes.host == {name: plain.device[name] for name in moved}
        assert not moved & sizes.device.keys()
        assert sizes.total < plain.total


def test_lora_trains_little_and_needs_no_reference() -> None:
    facts = model("qwen2_32b")
    given = sharded(4).model_copy(update={"lora": LoraConfig(rank=16)})
    sizes = learner_sizes(given, facts).device
    assert "reference" not in sizes
    assert sizes["weights"] == pytest.approx(2 * facts.parameters / 4, rel=0.01)
    assert sizes["gradients"] + sizes["moments of the optimiser"] < 0.03 * sizes["weights"]
    small = given.model_copy(update={"lora": LoraConfig(rank=16, base="4bit")})
    assert learner_sizes(small, facts).device["weights"] < 0.4 * sizes["weights"]


def test_what_does_not_fit_is_named_with_keys_that_make_it_fit() -> None:
    alone = fit_on(config(), model("qwen2_7b"), 8, 80)
    assert len(alone.problems) == 1
    assert "a learner process needs 1" in alone.problems[0]
    assert alone.changes == {"learner.processes": 4, "learner.sharding": "fsdp2"}
    assert alone.enough == 8
    assert any(line.startswith("change: learner.processes=4 ") for line in fit_lines(alone))
    fits = fit_on(sharded(4), model("qwen2_7b"), 8, 80)
    assert fits.problems == ()
    assert fit_lines(fits)[-1] == "fits"
    assert sum(fits.learner.device.values()) < 60 * GB


def test_a_model_for_which_there_are_too_few_gpus_is_told_how_many_would_do() -> None:
    fit = fit_on(sharded(4), model("llama_70b"), 8, 80)
    assert any("a learner process needs" in problem for problem in fit.problems)
    assert any("an engine needs" in problem for problem in fit.problems)
    assert fit.enough > 8
    assert f"change on {fit.enough} GPUs of this kind: " in fit_lines(fit)[-1]


def test_more_gpus_than_there_are_is_a_problem() -> None:
    fit = fit_on(sharded(8), model("qwen2_7b"), 8, 80)
    assert "9 GPUs are wanted" in fit.problems[0]


def test_a_file_that_is_no_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"is no config\.json of a decoder"):
        shapes(config(), str(tmp_path / "config.json"))
    with pytest.raises(UserError, match="--model-config"):
        shapes(config(), None)
