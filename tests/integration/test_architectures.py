"""`accord train` from end to end, with vLLM, on a tiny random model of each supported family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.long


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma", "mistral"])
def test_a_family_is_trained_and_its_policy_loads_in_both_engines(
    arch: str, world: Any, accord: Any, tmp_path: Path
) -> None:
    from learner.models.load import load_tokenizer
    from learner.models.tiny import fresh_model

    model = tmp_path / arch
    tokenizer = load_tokenizer(str(world.policy))
    fresh_model(tokenizer, model, hidden=64, layers=2, heads=2, intermediate=64, arch=arch)
    config = world.train_toml(
        accord.folder / "c.toml",
        'type = "rules"\nmax_words = 4',
        model=f'path = "{model}"',
        rollout='engine = "vllm"\nmax_tokens = 8',
        staleness="bound = 0",
        learner="lr = 1e-2",
        batch="prompts_per_step = 2\nsamples_per_prompt = 2\nsteps = 3",
    )
    command = accord.start("train", config, "--quiet")
    assert command.wait(240) == 0, command.stderr
    run = accord.folder / "runs" / "r"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(row["sampling/logp_diff_max"] for row in rows) <= 1e-4
    # The result loads with transformers (load_policy) and with vLLM (generate).
    from cluster.contracts.config.base import ModelConfig
    from learner.models.load import load_policy

    load_policy(ModelConfig(path=str(run / "policy")))
    answers = accord.folder / "answers.jsonl"
    words = ["generate", run / "policy", world.prompts, "--out", answers, "--max-tokens", "6"]
    again = accord.start(*words, "--quiet")
    assert again.wait(120) == 0, again.stderr
    assert len(answers.read_text().splitlines()) == 16
    assert command.left() == again.left() == []
