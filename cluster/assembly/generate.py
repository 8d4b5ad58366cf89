"""`accord generate`: answers of a model to prompts, as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.assembly.sampling import Sampling, answer_row, prompts_for, sample_in_cluster
from cluster.contracts.config.base import ClusterConfig, ModelConfig
from cluster.contracts.config.file import check_config
from cluster.contracts.config.rollout import DataConfig, RolloutConfig
from cluster.contracts.records import Rollout
from cluster.machine.cores import own_cores
from cluster.machine.ray_session import ray_cluster
from cluster.runs.console import Reporter
from cluster.runs.run import require_writable, write_text


def generate_to_file(
    model: str,
    prompts: str,
    out: Path,
    *,
    samples: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    reporter: Reporter,
) -> None:
    """One JSON line per completion: prompt, completion, finish_reason, tokens."""
    require_writable(out)
    answers = generate_completions(
        model, prompts, samples=samples, max_tokens=max_tokens, temperature=temperature,
        seed=seed, reporter=reporter,
    )  # fmt: skip
    write_text(out, "".join(json.dumps(answer_row(a), ensure_ascii=False) + "\n" for a in answers))


def generate_completions(
    model: str,
    prompts: str,
    *,
    samples: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    reporter: Reporter,
) -> list[Rollout]:
    """``samples`` completions of each prompt of a file, in its order."""
    config = ModelConfig(path=model)
    data = DataConfig(prompts=prompts, shuffle=False)
    sampling = {"max_tokens": max_tokens, "temperature": temperature}
    rollout = check_config(
        RolloutConfig, {**sampling, "workers": max(1, len(own_cores()))}, where="command line"
    )
    ready = prompts_for(config, data, seed, max_tokens=max_tokens)
    job = Sampling(
        model=config,
        prompts=ready,
        samples=samples,
        rollout=rollout,
        max_prompt_tokens=max(len(p.token_ids) for p in ready),
        seed=seed,
    )
    with ray_cluster(ClusterConfig()), reporter.stage(f"{len(ready)} prompts"):
        return sample_in_cluster([job])[0]
