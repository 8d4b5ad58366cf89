"""The completions of a round: sampled with vLLM, and written to files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.assembly.generate import sample_prompts
from cluster.assembly.sampling import answer_row, prompts_for
from cluster.contracts.chat import is_text
from cluster.contracts.config.base import ModelConfig
from cluster.contracts.config.pipeline import PipelineConfig, SampleConfig
from cluster.contracts.durable import write_text
from cluster.contracts.records import Prompt
from cluster.pipeline.completions import COMPLETIONS, PROMPTS
from cluster.pipeline.rounds import Round
from cluster.runs.console import Reporter


def sample_round(
    config: PipelineConfig, at: Round, model: ModelConfig, folder: Path, reporter: Reporter
) -> dict[str, int]:
    """Write the round's prompts and their completions; returns how many there are."""
    from learner.models.hub import pinned

    sample, seed = config.sample, config.run.seed + at.number - 1
    model, rollout = pinned(model), sample.rollout
    everything = prompts_for(
        model, sample.data, config.run.seed, max_tokens=rollout.max_tokens, say=reporter.say
    )
    prompts = prompts_of_round(everything, sample, at.number)
    write_text(folder / PROMPTS, _lines(_prompt_row(prompt) for prompt in prompts))
    rollouts = sample_prompts(
        model, prompts, rollout, sample.samples, seed, config.cluster, reporter
    )
    wrote = {
        "run": at.record.folder.name,
        "policy_version": version_of(at),
        "sampling": {
            "temperature": rollout.temperature, "max_tokens": rollout.max_tokens, "seed": seed
        },
    }  # fmt: skip
    rows = ({**answer_row(rollout), **wrote} for rollout in rollouts)
    write_text(folder / COMPLETIONS, _lines(rows))
    return {"prompts": len(prompts), "completions": len(rollouts)}


def version_of(at: Round) -> str:
    """Of the policy that writes the round's completions: the round that made it."""
    return "round 0" if at.before == at.start else Path(at.before).parents[1].name.replace("-", " ")


def prompts_of_round(prompts: Sequence[Prompt], sample: SampleConfig, number: int) -> list[Prompt]:
    """Each round takes the next ones, and begins again after the last."""
    count = min(sample.prompts_per_round or len(prompts), len(prompts))
    first = (number - 1) * count
    return [prompts[(first + n) % len(prompts)] for n in range(count)]


def _prompt_row(prompt: Prompt) -> dict[str, Any]:
    text = is_text(prompt.messages)
    shown = prompt.messages[0]["content"] if text else [dict(m) for m in prompt.messages]
    return {"prompt": shown, "metadata": dict(prompt.metadata)}


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
