"""`accord generate`: answers of a model to prompts, as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.assembly.adapted import adapted
from cluster.assembly.local_workers import sampling_cluster
from cluster.assembly.sampling import Sampling, answer_row, prompts_for, sample_jobs
from cluster.assembly.shipping import sampled_models
from cluster.contracts.config.base import ClusterConfig, ModelConfig
from cluster.contracts.config.file import check_config
from cluster.contracts.config.rollout import DataConfig, RolloutConfig
from cluster.contracts.durable import write_text
from cluster.contracts.records import Prompt, Rollout
from cluster.machine.cores import own_cores
from cluster.runs.console import Reporter
from cluster.runs.policies import version_of
from cluster.runs.run import require_writable


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
    limits: Mapping[str, Any] | None = None,
) -> None:
    """One JSON line per completion: prompt, completion, finish_reason, tokens, and which policy
    wrote it.

    limits: as in `generate_completions`.
    """
    require_writable(out)
    answers = generate_completions(
        model, prompts, samples=samples, max_tokens=max_tokens, temperature=temperature,
        seed=seed, reporter=reporter, limits=limits,
    )  # fmt: skip
    local = Path(model).is_dir()
    written_by = {"run": model, "policy_version": version_of(model)} if local else {"run": model}
    rows = [json.dumps({**answer_row(a), **written_by}, ensure_ascii=False) for a in answers]
    write_text(out, "".join(f"{row}\n" for row in rows))


def generate_completions(
    model: str,
    prompts: str,
    *,
    samples: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    reporter: Reporter,
    limits: Mapping[str, Any] | None = None,
) -> list[Rollout]:
    """``samples`` completions of each prompt of a file, in its order.

    limits: further keys of [rollout] that say what may be sampled: top_k, top_p, min_p, min_tokens,
    allowed_tokens, banned_tokens, stop. Raises UserError for a value that cannot be.
    """
    from learner.models.hub import pinned

    config = pinned(adapted(ModelConfig(path=model)))
    data = DataConfig(prompts=prompts, shuffle=False)
    sampling = {"max_tokens": max_tokens, "temperature": temperature, **(limits or {})}
    rollout = check_config(
        RolloutConfig, {**sampling, "workers": max(1, len(own_cores()))}, where="command line"
    )
    ready = prompts_for(config, data, seed, max_tokens=max_tokens, say=reporter.say)
    return sample_prompts(config, ready, rollout, samples, seed, ClusterConfig(), reporter)


def sample_prompts(
    model: ModelConfig,
    prompts: Sequence[Prompt],
    rollout: RolloutConfig,
    samples: int,
    seed: int,
    cluster: ClusterConfig,
    reporter: Reporter,
) -> list[Rollout]:
    """``samples`` completions of each prompt, in order."""
    job = Sampling(
        model=model,
        prompts=prompts,
        samples=samples,
        rollout=rollout,
        max_prompt_tokens=max(len(p.token_ids) for p in prompts),
        seed=seed,
    )
    with (
        sampling_cluster(cluster, rollout) as ray_info,
        sampled_models([model], ray_info) as files,
        reporter.stage(f"{samples} completions for each of {len(prompts)} prompts"),
    ):
        return sample_jobs([replace(job, files=files[0])])[0]
