"""Which number type is computed in, on machines that are faster or slower in bfloat16."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.assembly.auto.choices import Resolved
from cluster.assembly.auto.resolve import (
    resolve_evaluation,
    resolve_fit,
    resolve_sampling,
    resolve_service,
    resolve_training,
)
from cluster.assembly.model_facts import ModelFacts
from cluster.contracts.config.evaluate import EvaluateConfig
from cluster.contracts.config.file import load_config
from cluster.contracts.config.offline import SftConfig
from cluster.contracts.config.rollout import RolloutConfig
from cluster.contracts.config.train import TrainConfig
from cluster.machine.hardware import Machine
from cluster.machine.products import Products

MODEL = ModelFacts(
    parameters=900_000, layers=4, hidden=128, intermediate=384, kv_heads=4, head_size=32,
    vocabulary=640, context=512,
)  # fmt: skip
UNMEASURED = Machine(cores=2, memory_mb=24 << 10, shared_memory_mb=12 << 10)
GPU = replace(UNMEASURED, gpus=1, gpu_memory_mb=81559)
TRAINING = ("model.path=m", "data.prompts=p.jsonl", 'reward.sources=[{type="rules"}]')
LORA = ("lora.rank=4",)
FSDP2 = ("learner.sharding=fsdp2", "learner.processes=2")


def cpu(gain: float, decoding: float | None = None) -> Machine:
    """decoding: the gain in products of few rows, as an engine has them."""

    def products(rows: int, inner: int, outer: int) -> Products:
        speed = 100.0 * (gain if rows > 128 or decoding is None else decoding)
        return Products(rows=rows, inner=inner, outer=outer, float32=100.0, bfloat16=speed)

    return replace(UNMEASURED, products=products)


def training(
    machine: Machine, *words: str, model: ModelFacts | None = MODEL
) -> Resolved[TrainConfig]:
    return resolve_training(load_config(TrainConfig, None, [*TRAINING, *words]), machine, model)


def types(resolved: Resolved[TrainConfig]) -> tuple[str, str]:
    return resolved.config.model.dtype, resolved.config.rollout.dtype


@pytest.mark.parametrize(
    ("machine", "wanted"),
    [
        (cpu(1.9), ("bfloat16", "bfloat16")),
        (cpu(1.1), ("float32", "float32")),
        (cpu(0.3), ("float32", "float32")),
        (cpu(1.9, decoding=1.0), ("bfloat16", "float32")),
        (UNMEASURED, ("float32", "float32")),
        (GPU, ("bfloat16", "bfloat16")),
        (replace(GPU, gpu_compute=9.0), ("bfloat16", "bfloat16")),
        (replace(GPU, gpu_compute=7.5), ("float32", "float32")),
    ],
)
def test_the_faster_type_is_taken(machine: Machine, wanted: tuple[str, str]) -> None:
    assert types(training(machine)) == wanted


def test_the_reason_has_what_was_measured() -> None:
    resolved = training(cpu(1.9, decoding=1.5))
    learner, engine = (resolved.reasons[key].why for key in ("model.dtype", "rollout.dtype"))
    assert "[512, 128] x [128, 384]: 190 GFLOP/s" in learner
    assert "1.90 times" in learner
    assert "[128, 128] x [128, 384]" in engine
    assert "1.50 times" in engine
    few = training(cpu(1.9), "batch.prompts_per_step=2", "batch.samples_per_prompt=4")
    assert "[24, 128] x" in few.reasons["rollout.dtype"].why, "so many can be outstanding"
    assert "compute capability 7.5" in training(replace(GPU, gpu_compute=7.5)).reasons[
        "model.dtype"
    ].why.replace("\n", " ")


def test_what_the_user_set_is_neither_changed_nor_measured() -> None:
    def refuse(rows: int, inner: int, outer: int) -> Products:
        raise AssertionError("was measured")

    machine = replace(UNMEASURED, products=refuse)
    words = ("model.dtype=float32", "rollout.dtype=bfloat16")
    assert types(training(machine, *words)) == ("float32", "bfloat16")


def test_a_model_that_cannot_be_read_is_not_measured() -> None:
    assert types(training(cpu(1.9), model=None)) == ("float32", "float32")


@pytest.mark.parametrize("held", [LORA, FSDP2])
@pytest.mark.parametrize(
    ("machine", "word", "wanted"),
    [
        (cpu(1.9), "rollout.dtype=float32", ("float32", "float32")),
        (cpu(1.0), "model.dtype=bfloat16", ("bfloat16", "bfloat16")),
        (cpu(1.9, decoding=1.0), "", ("float32", "float32")),
        (cpu(1.9), "", ("bfloat16", "bfloat16")),
    ],
)
def test_weights_held_in_short_need_engines_that_round_as_well(
    held: tuple[str, ...], machine: Machine, word: str, wanted: tuple[str, str]
) -> None:
    assert types(training(machine, *held, *filter(None, [word]))) == wanted


def test_offline_training_and_engines_alone() -> None:
    sft = load_config(SftConfig, None, ["model.path=m", "data.path=d.jsonl"])
    for gain, wanted in ((1.9, "bfloat16"), (1.0, "float32")):
        assert resolve_fit(sft, cpu(gain), MODEL).config.model.dtype == wanted
        rollout = resolve_sampling(
            RolloutConfig(), cpu(gain), MODEL, engines=1, prompt_tokens=32, outstanding=200
        )
        assert rollout.dtype == wanted
        evaluation = EvaluateConfig.model_validate(
            {
                "policy": {"path": "a"},
                "baseline": {"path": "b"},
                "data": {"prompts": "p"},
                "judge": {"sources": [{"type": "rules"}]},
            }
        )
        found = resolve_evaluation(evaluation, cpu(gain), MODEL).config
        assert found.rollout.dtype == wanted


REWARDED = ('reward.sources=[{type="model", path="rm"}]',)


def rewarded(
    machine: Machine, *words: str, model: ModelFacts | None = MODEL, keeps_scores: bool = False
) -> Resolved[Any]:
    config = load_config(TrainConfig, None, [*TRAINING[:2], *REWARDED, *words])
    return resolve_training(config, machine, MODEL, model, keeps_scores=keeps_scores)


@pytest.mark.parametrize(
    ("machine", "words", "wanted"),
    [
        # A model whose scores lie close together would be refused.
        (cpu(1.9), (), "float32"),
        (cpu(1.9), ("reward.dtype=bfloat16",), "bfloat16"),
        (GPU, ("reward.gpus=0.2",), "bfloat16"),
        (replace(GPU, gpu_compute=7.5), ("reward.gpus=0.2",), "float32"),
        (replace(GPU, products=cpu(1.0).products), (), "float32"),  # its services score on CPUs
    ],
)
def test_reward_models(machine: Machine, words: tuple[str, ...], wanted: str) -> None:
    assert rewarded(machine, *words).config.reward.dtype == wanted


def test_reward_models_that_keep_their_scores_in_bfloat16() -> None:
    for gain, wanted in ((1.9, "bfloat16"), (1.1, "float32")):
        assert rewarded(cpu(gain), keeps_scores=True).config.reward.dtype == wanted


def test_no_reward_model_is_not_measured() -> None:
    assert "no reward model" in training(cpu(1.9)).reasons["reward.dtype"].why
    assert rewarded(cpu(1.9), model=None).config.reward.dtype == "float32"


def test_a_service_of_its_own() -> None:
    reward = load_config(TrainConfig, None, [*TRAINING[:2], *REWARDED]).reward
    assert "dtype" not in reward.model_fields_set
    for machine in (cpu(1.9), GPU):
        found = resolve_service(reward, machine)
        assert "dtype" in found.model_fields_set
        assert found.gpus == 0
    assert resolve_service(reward, GPU).dtype == "bfloat16"
