"""What `auto` becomes on machines and with models that are not here."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from typing import Any

import pytest

from cluster.assembly.auto.choices import Choices
from cluster.assembly.auto.resolve import resolve_evaluation, resolve_sampling, resolve_training
from cluster.assembly.model_facts import ModelFacts
from cluster.contracts.config.base import Section, auto_rule
from cluster.contracts.config.evaluate import EvaluateConfig
from cluster.contracts.config.file import check_config, dump_toml, load_config
from cluster.contracts.config.rollout import RolloutConfig
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import UserError
from cluster.machine.hardware import Machine

GB = 1024
LAPTOP = Machine(cores=2, memory_mb=24 * GB, shared_memory_mb=12 * GB)
SMALL_LAPTOP = Machine(cores=2, memory_mb=4 * GB, shared_memory_mb=2 * GB)
SERVER = Machine(cores=64, memory_mb=256 * GB, shared_memory_mb=128 * GB)
ONE_H100 = Machine(
    cores=16, memory_mb=128 * GB, shared_memory_mb=64 * GB, gpus=1, gpu_memory_mb=81559
)
EIGHT_H100 = Machine(
    cores=128, memory_mb=1024 * GB, shared_memory_mb=512 * GB, gpus=8, gpu_memory_mb=81559
)
QUICKSTART = ModelFacts(
    parameters=1_000_000,
    layers=4,
    hidden=128,
    kv_heads=4,
    head_size=32,
    vocabulary=640,
    context=512,
)
HALF_B = ModelFacts(
    parameters=494_000_000, layers=24, hidden=896, kv_heads=2, head_size=64, vocabulary=151_936,
    context=32_768,
)  # fmt: skip
SEVEN_B = ModelFacts(
    parameters=7_600_000_000, layers=28, hidden=3584, kv_heads=4, head_size=128, vocabulary=152_064,
    context=32_768,
)  # fmt: skip


def config(*words: str) -> TrainConfig:
    given = ["model.path=m", "data.prompts=p.jsonl", 'reward.sources=[{type="rules"}]', *words]
    return load_config(TrainConfig, None, given)


def value(resolved: Section, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(resolved, section), name)


QUICKSTART_WORDS = ("data.max_prompt_tokens=48", "rollout.max_tokens=64")

CASES: list[tuple[str, Machine, ModelFacts | None, tuple[str, ...], dict[str, Any]]] = [
    (
        "the quickstart on two cores: as it was with every value fixed",
        LAPTOP,
        QUICKSTART,
        QUICKSTART_WORDS,
        {
            "model.dtype": "float32",
            "rollout.dtype": "float32",
            "rollout.max_running": 64,
            "rollout.kv_cache_mb": 64,
            "rollout.cpus": 1.0,
            "rollout.gpus": 0.0,
            "learner.cpus": 1.0,
            "learner.gpus": 0.0,
            "cluster.pin_cores": True,
            "cluster.num_cpus": 8,
            "cluster.object_store_mb": 256,
            "cluster.dashboard": False,
        },
    ),
    (
        "a small model with nothing set: half of its context",
        LAPTOP,
        QUICKSTART,
        (),
        {"rollout.max_tokens": 256, "rollout.max_running": 64, "rollout.kv_cache_mb": 130},
    ),
    (
        "the longest prompt that was set bounds the completion",
        LAPTOP,
        QUICKSTART,
        ("data.max_prompt_tokens=400",),
        {"rollout.max_tokens": 112},
    ),
    (
        "two workers on two cores: nobody has a core of its own",
        LAPTOP,
        QUICKSTART,
        ("rollout.workers=2",),
        {"rollout.cpus": 1.0, "learner.cpus": 1.0, "cluster.pin_cores": False},
    ),
    (
        "half a billion parameters in 4 GB: the cache bounds what is decoded at once",
        SMALL_LAPTOP,
        HALF_B,
        (),
        {"rollout.max_running": 55, "rollout.kv_cache_mb": 1008, "cluster.object_store_mb": 1638},
    ),
    (
        "half a billion on two cores",
        LAPTOP,
        HALF_B,
        (),
        {
            "rollout.max_running": 64,
            "rollout.kv_cache_mb": 1170,
            "rollout.cpus": 1.0,
            "cluster.object_store_mb": 6849,
        },
    ),
    (
        "half a billion on two cores: the learner computes on both, beside the worker",
        LAPTOP,
        HALF_B,
        (),
        {"rollout.cpus": 1.0, "learner.cpus": 2.0, "cluster.pin_cores": False},
    ),
    (
        "unless the cores are to be kept apart",
        LAPTOP,
        HALF_B,
        ("cluster.pin_cores=true",),
        {"learner.cpus": 1.0, "cluster.pin_cores": True},
    ),
    (
        "a learner that was given more cores than the worker leaves shares them",
        LAPTOP,
        QUICKSTART,
        ("learner.cpus=2",),
        {"rollout.cpus": 1.0, "cluster.pin_cores": False},
    ),
    (
        "a tiny model on a large server takes few cores",
        SERVER,
        QUICKSTART,
        (),
        {
            "rollout.cpus": 1.0,
            "learner.cpus": 8.0,
            "cluster.num_cpus": 64,
            "cluster.dashboard": True,
        },
    ),
    (
        "half a billion on a large server: a worker's limit, the learner has the rest",
        SERVER,
        HALF_B,
        (),
        {"rollout.cpus": 16.0, "learner.cpus": 47.0, "cluster.num_cpus": 96},
    ),
    (
        "four workers and two learner processes on a large server",
        SERVER,
        SEVEN_B,
        ("rollout.workers=4", "learner.processes=2"),
        {"rollout.cpus": 8.0, "learner.cpus": 15.0, "cluster.pin_cores": True},
    ),
    (
        "one H100 is shared",
        ONE_H100,
        HALF_B,
        (),
        {
            "model.dtype": "bfloat16",
            "rollout.dtype": "bfloat16",
            "rollout.gpus": 0.5,
            "learner.gpus": 0.5,
            "rollout.gpu_memory_fraction": 0.438,
            "rollout.max_running": 384,
            # 385 sequences of 1536 tokens, 12 KiB each, in blocks of 32.
            "rollout.kv_cache_mb": 6930,
            "learner.tokens_per_microbatch": 8192,
            "cluster.pin_cores": False,
        },
    ),
    (
        "one H100 that is shared, a cache that the user set: 18 MiB for a sequence, one is spare",
        ONE_H100,
        HALF_B,
        ("rollout.kv_cache_mb=1000",),
        {"rollout.gpus": 0.5, "rollout.kv_cache_mb": 1000, "rollout.max_running": 54},
    ),
    (
        "one H100 with two workers: they share what the learner leaves",
        ONE_H100,
        HALF_B,
        ("rollout.workers=2",),
        {"rollout.gpus": 0.25, "rollout.gpu_memory_fraction": 0.213, "rollout.max_running": 192},
    ),
    (
        "one H100 with a learner on the CPU: the worker has the GPU",
        ONE_H100,
        HALF_B,
        ("learner.gpus=0",),
        {
            "rollout.gpus": 1.0,
            "rollout.gpu_memory_fraction": 0.888,
            "model.dtype": "float32",
            "learner.cpus": 15.0,
        },
    ),
    (
        "one H100 that the user gave to the worker",
        ONE_H100,
        HALF_B,
        ("rollout.gpus=1",),
        {"learner.gpus": 0.0, "rollout.gpu_memory_fraction": 0.888},
    ),
    (
        "eight H100: one for each process",
        EIGHT_H100,
        SEVEN_B,
        ("rollout.workers=4", "learner.processes=4"),
        {"rollout.gpus": 1.0, "learner.gpus": 1.0, "rollout.gpu_memory_fraction": 0.722},
    ),
    (
        "eight H100, an engine on two of them",
        EIGHT_H100,
        SEVEN_B,
        ("rollout.workers=2", "rollout.tensor_parallel=2", "learner.processes=4"),
        {"rollout.gpus": 2.0, "learner.gpus": 1.0},
    ),
    (
        "more workers than GPUs are left for",
        EIGHT_H100,
        HALF_B,
        ("rollout.workers=9", "learner.processes=4"),
        {"learner.gpus": 1.0, "rollout.gpus": 0.3333, "rollout.gpu_memory_fraction": 0.288},
    ),
    (
        "seven billion on half a GPU: the weights leave little",
        ONE_H100,
        SEVEN_B,
        (),
        {"rollout.max_running": 41},
    ),
    (
        "a joined cluster: no core is dealt out, its store is not ours",
        SERVER,
        HALF_B,
        ("cluster.address=auto",),
        {
            "cluster.pin_cores": False,
            "cluster.num_cpus": None,
            "cluster.object_store_mb": 256,
            "rollout.gpus": 0.0,
        },
    ),
    (
        "a model whose config cannot be read",
        LAPTOP,
        None,
        (),
        {"rollout.max_tokens": 256, "rollout.max_running": 64, "rollout.kv_cache_mb": 64},
    ),
    ("a short run", LAPTOP, QUICKSTART, ("batch.steps=4",), {"checkpoint.every": 10}),
    ("nothing ahead", LAPTOP, QUICKSTART, (), {"learner.stream_parts": 1}),
    (
        "synchronous",
        LAPTOP,
        QUICKSTART,
        ("staleness.bound=0", "batch.prompts_per_step=32", "rollout.max_tokens=64"),
        {"learner.stream_parts": 4},
    ),
    (
        "synchronous, small steps",
        LAPTOP,
        QUICKSTART,
        (
            "staleness.bound=0",
            "batch.prompts_per_step=2",
            "data.max_prompt_tokens=32",
            "rollout.max_tokens=16",
        ),
        {"learner.stream_parts": 1},
    ),
    (
        "synchronous, two learners",
        LAPTOP,
        QUICKSTART,
        ("staleness.bound=0", "batch.prompts_per_step=32", "learner.processes=2"),
        {"learner.stream_parts": 1},
    ),
    ("a run of 100 steps", LAPTOP, QUICKSTART, (), {"checkpoint.every": 20}),
    ("a long run", LAPTOP, QUICKSTART, ("batch.steps=1000",), {"checkpoint.every": 50}),
]


@pytest.mark.parametrize(
    ("machine", "model", "words", "wanted"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_what_auto_becomes(
    machine: Machine, model: ModelFacts | None, words: tuple[str, ...], wanted: dict[str, Any]
) -> None:
    resolved = resolve_training(config(*words), machine, model)
    assert {key: value(resolved.config, key) for key in wanted} == wanted
    for key, reason in resolved.reasons.items():
        assert reason.value == value(resolved.config, key)
        assert reason.why


def auto_keys() -> set[str]:
    return {
        f"{section}.{name}"
        for section, outer in TrainConfig.model_fields.items()
        if isinstance(outer.annotation, type) and issubclass(outer.annotation, Section)
        for name, field in outer.annotation.model_fields.items()
        if auto_rule(field)
    }


@pytest.mark.parametrize("machine", [LAPTOP, SERVER, ONE_H100, EIGHT_H100])
@pytest.mark.parametrize("model", [QUICKSTART, HALF_B, SEVEN_B, None])
def test_every_key_is_chosen_and_a_second_time_nothing_is(
    machine: Machine, model: ModelFacts | None
) -> None:
    resolved = resolve_training(config(), machine, model)
    assert set(resolved.reasons) == auto_keys()
    again = resolve_training(resolved.config, LAPTOP, None)
    assert again.config == resolved.config
    assert again.reasons == {}


def test_what_a_run_stores_resolves_to_itself_on_another_machine() -> None:
    resolved = resolve_training(config(), ONE_H100, HALF_B).config
    stored = check_config(TrainConfig, tomllib.loads(dump_toml(resolved)), where="config.toml")
    assert resolve_training(stored, LAPTOP, QUICKSTART).config == resolved


def test_a_config_that_is_written_before_it_is_resolved_keeps_auto() -> None:
    given = config("rollout.max_running=9", "cluster.num_cpus=auto")
    tree = given.model_dump()
    assert (tree["rollout"]["max_running"], tree["rollout"]["kv_cache_mb"]) == (9, "auto")
    read = check_config(TrainConfig, tree, where="")
    wanted = resolve_training(given, SERVER, HALF_B)
    assert resolve_training(read, SERVER, HALF_B).config == wanted.config
    dumped = wanted.config.model_dump()["rollout"]
    assert dumped["kv_cache_mb"] == wanted.config.rollout.kv_cache_mb


@pytest.mark.parametrize(("gpus", "tokens"), [("0.5", 2048), ("1", 4096)])
def test_a_microbatch_fits_the_learners_share_of_the_gpu(gpus: str, tokens: int) -> None:
    """Of a layer with 16-bit numbers: 2 * (4 * 3584 + 128 * 64 + 4 * 18944) + 8 * 3584 bytes a
    token, 6 MiB in 28 layers; 2048 tokens keep 12.0 GiB and 4096 keep 24.1. A third of the GPU
    is 26.5 GiB, a third of its half 13.3."""
    model = replace(SEVEN_B, heads=28, intermediate=18944)
    assert model.activation_bytes(2) == 225_280
    words = (f"learner.gpus={gpus}", "rollout.gpus=0.5")
    resolved = resolve_training(config(*words), ONE_H100, model)
    assert resolved.config.learner.tokens_per_microbatch == tokens


@pytest.mark.parametrize("key", sorted(auto_keys()))
def test_a_value_that_was_set_is_never_changed(key: str) -> None:
    chosen = {
        "model.dtype": "float32",
        "rollout.dtype": "float32",
        "reward.dtype": "bfloat16",
        "rollout.gpu_memory_fraction": 0.3,
        "rollout.gpus": 0.75,
        "learner.gpus": 0.75,
        "cluster.pin_cores": True,
        "cluster.dashboard": False,
        "cluster.object_store_mb": 99,
        "learner.tokens_per_microbatch": 99,
    }.get(key, 9)
    text = str(chosen).lower() if isinstance(chosen, bool) else str(chosen)
    resolved = resolve_training(config(f"{key}={text}"), EIGHT_H100, SEVEN_B)
    assert value(resolved.config, key) == chosen
    assert key not in resolved.reasons


@pytest.mark.parametrize("key", sorted(auto_keys()))
def test_the_word_auto_undoes_what_a_file_sets(key: str) -> None:
    assert config(f"{key}=9" if key != "cluster.pin_cores" else f"{key}=true", f"{key}=auto") == (
        config()
    )
    resolved = resolve_training(config(f"{key}=auto"), LAPTOP, HALF_B)
    assert resolved.config == resolve_training(config(), LAPTOP, HALF_B).config


def test_auto_is_no_value_where_nothing_is_chosen() -> None:
    with pytest.raises(UserError, match=r"batch\.steps = .auto."):
        config("batch.steps=auto")


def test_a_key_that_is_not_marked_cannot_be_chosen() -> None:
    with pytest.raises(ValueError, match=r"batch\.steps is not a key"):
        Choices(config(), LAPTOP).settle("batch.steps", 3, "no")


def test_the_shortest_completion_that_was_set_is_possible() -> None:
    resolved = resolve_training(config("rollout.min_tokens=300"), LAPTOP, QUICKSTART)
    assert resolved.config.rollout.max_tokens == 300


def test_an_evaluation_has_two_policies_side_by_side() -> None:
    given = EvaluateConfig.model_validate(
        {
            "policy": {"path": "a"},
            "baseline": {"path": "b"},
            "data": {"prompts": "p"},
            "judge": {"sources": [{"type": "rules"}]},
        }
    )
    on_cpu = resolve_evaluation(given, LAPTOP, HALF_B).config
    assert on_cpu.rollout.kv_cache_mb == 65 * 18
    assert on_cpu.rollout.gpus == 0
    on_gpu = resolve_evaluation(given, ONE_H100, HALF_B).config
    assert (on_gpu.rollout.gpus, on_gpu.rollout.gpu_memory_fraction) == (0.5, 0.45)
    assert on_gpu.rollout.dtype == "bfloat16"


def test_sampling_decodes_no_more_than_there_is() -> None:
    rollout = resolve_sampling(
        RolloutConfig(max_tokens=64),
        LAPTOP,
        QUICKSTART,
        engines=2,
        prompt_tokens=48,
        outstanding=20,
    )
    assert (rollout.max_running, rollout.kv_cache_mb, rollout.max_tokens) == (10, 64, 64)


def test_a_joined_cluster_is_said_to_be_taken_for_machines_like_this_one() -> None:
    joined = resolve_training(config("cluster.address=auto"), SERVER, HALF_B)
    alone = resolve_training(config(), SERVER, HALF_B)
    for key in ("rollout.cpus", "learner.cpus"):
        assert joined.reasons[key].why.endswith("taken to be like this one")
        assert "like this one" not in alone.reasons[key].why
    assert "other machines of the cluster" in joined.reasons["learner.gpus"].why
