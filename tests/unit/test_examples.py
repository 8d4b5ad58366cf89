"""The examples: each is a valid config, for any model, on any machine."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cluster.assembly.auto.resolve import resolve_evaluation, resolve_fit, resolve_training
from cluster.assembly.model_facts import ModelFacts
from cluster.contracts.config.ai_label import AiLabelConfig
from cluster.contracts.config.base import Section
from cluster.contracts.config.best_of_n import BestOfNConfig
from cluster.contracts.config.choice import ChoiceConfig
from cluster.contracts.config.constitution import ConstitutionConfig
from cluster.contracts.config.evaluate import EvaluateConfig
from cluster.contracts.config.file import load_config
from cluster.contracts.config.label import LabelConfig
from cluster.contracts.config.offline import DpoConfig, RewardModelConfig, SftConfig
from cluster.contracts.config.pipeline import PipelineConfig
from cluster.contracts.config.preferences import PreferencesConfig
from cluster.contracts.config.reward import FunctionSource
from cluster.contracts.config.train import TrainConfig
from cluster.machine.hardware import Machine

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))
OTHERS: dict[str, type[Section]] = {
    "sft": SftConfig,
    **dict.fromkeys(("dpo", "ipo", "kto", "orpo", "simpo"), DpoConfig),
    **dict.fromkeys(("reward_model", "reward_ensemble"), RewardModelConfig),
    **dict.fromkeys(("pipeline", "my_clicks"), PipelineConfig),
    "best_of_n": BestOfNConfig,
    "ai_label": AiLabelConfig,
    "constitution": ConstitutionConfig,
    **dict.fromkeys(
        ("evaluate", "evaluate_ai", "evaluate_people", "evaluate_ranking", "red_team"),
        EvaluateConfig,
    ),
    "label": LabelConfig,
    "snapshot": PreferencesConfig,
    "choice": ChoiceConfig,
}
NOTHING_TO_RESOLVE = (
    BestOfNConfig,
    LabelConfig,
    PreferencesConfig,
    ChoiceConfig,
    AiLabelConfig,
    ConstitutionConfig,
    PipelineConfig,
)
LAPTOP = Machine(cores=2, memory_mb=16_384, shared_memory_mb=8192)
ONE_GPU = Machine(
    cores=16, memory_mb=131_072, shared_memory_mb=65_536, gpus=1, gpu_memory_mb=81_559
)
SMALL = ModelFacts(
    parameters=900_000, layers=4, hidden=128, kv_heads=4, head_size=32, vocabulary=640, context=512
)
LARGE = ModelFacts(
    parameters=1_540_000_000, layers=28, hidden=1536, kv_heads=2, head_size=128,
    vocabulary=151_936, context=32_768,
)  # fmt: skip


def loaded(example: Path) -> Section:
    return load_config(OTHERS.get(example.stem, TrainConfig), str(example))


@pytest.mark.parametrize("machine", [LAPTOP, ONE_GPU], ids=["laptop", "gpu"])
@pytest.mark.parametrize("model", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_resolves(example: Path, model: ModelFacts, machine: Machine) -> None:
    config = loaded(example)
    if isinstance(config, TrainConfig):
        resolved = resolve_training(config, machine, model).config
        longest = config.data.max_prompt_tokens + resolved.rollout.max_tokens
        assert model is SMALL or longest <= (model.context or 0)
    elif isinstance(config, EvaluateConfig):
        assert resolve_evaluation(config, machine, model).config.rollout.max_running >= 1
    elif not isinstance(config, NOTHING_TO_RESOLVE):
        assert resolve_fit(config, machine, model).config.fit.processes in (1, 2)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_head_says_what_an_example_needs_and_how_to_use_it_with_ones_own(example: Path) -> None:
    head = example.read_text(encoding="utf-8").splitlines()[:6]
    said = "\n".join(line for line in head if line.startswith("#"))
    if "runs/quickstart" in example.read_text(encoding="utf-8"):
        assert "accord quickstart" in said
        assert "your own" in said
    else:
        assert "Set your model" in said


def test_the_gpu_example_says_that_it_never_ran_and_fits_the_gpu() -> None:
    example = ROOT / "examples" / "gpu.toml"
    assert "NEVER RUN" in example.read_text(encoding="utf-8").splitlines()[1]
    config = loaded(example)
    assert isinstance(config, TrainConfig)
    resolved = resolve_training(config, ONE_GPU, LARGE).config
    assert (resolved.model.dtype, resolved.rollout.dtype) == ("bfloat16", "bfloat16")
    assert resolved.learner.gpus + resolved.rollout.gpus <= 1
    state = 16 + 4  # bytes a parameter: weight, gradient, two moments; and the reference
    engine_mb = resolved.rollout.gpu_memory_fraction * ONE_GPU.gpu_memory_mb
    assert state * LARGE.parameters / (1 << 20) + engine_mb < 0.9 * ONE_GPU.gpu_memory_mb
    assert resolved.rollout.max_running > 256


def rewards() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rewards", ROOT / "examples" / "rewards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_its_reward_functions_exist(example: Path) -> None:
    config: Any = loaded(example)
    given = getattr(config, "reward", getattr(config, "judge", None))
    for source in getattr(given, "sources", ()):
        if isinstance(source, FunctionSource):
            file, _, name = source.path.partition(":")
            assert file == "examples/rewards.py"
            assert callable(getattr(rewards(), name))


def test_about_thirty_words_fits_text_and_chat() -> None:
    texts = ["", "word " * 15, "word " * 30, "word " * 99]
    wanted = [0.0, 0.5, 1.0, 0.0]
    assert rewards().about_thirty_words(completions=texts, prompts=texts) == wanted
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    assert rewards().about_thirty_words(completions=chats) == wanted


def test_names_the_product_reads_the_column() -> None:
    scores = rewards().names_the_product(
        completions=["The Lamp is fine", "no", "no"], product=["lamp", "lamp", None]
    )
    assert scores == [1.0, 0.0, 1.0]
