"""`accord best-of-n`: sample, score, keep the best as demonstrations."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.assembly.judging import scores_of
from cluster.assembly.local_workers import sampling_cluster
from cluster.assembly.rewards import check_rewards
from cluster.assembly.run_session import run_session
from cluster.assembly.sampling import Sampling, answer_row, prompts_for, sample_jobs
from cluster.assembly.shipping import sampled_models
from cluster.contracts.config.best_of_n import BestOfNConfig
from cluster.contracts.durable import write_json, write_text
from cluster.contracts.errors import UserError
from cluster.contracts.records import Rollout, Score
from cluster.machine.resources import Need, require_resources
from cluster.runs.console import Reporter
from cluster.runs.run import Run

BEST = "best.jsonl"
ALL = "completions.jsonl"
FIGURES = "best_of_n.json"


@dataclass(frozen=True, slots=True)
class Scored:
    """A completion and its score."""

    rollout: Rollout
    score: Score

    @property
    def cut(self) -> bool:
        return self.rollout.completion.finish_reason == "length"


def run_best_of_n(config: BestOfNConfig, reporter: Reporter) -> Path:
    """Returns the run directory: best.jsonl (rows for `accord sft`), completions.jsonl (all, with
    scores), best_of_n.json (figures)."""
    from learner.models.hub import pinned

    config = config.model_copy(update={"model": pinned(config.model)})
    prompts = prompts_for(
        config.model, config.data, config.run.seed, config.max_prompts,
        config.rollout.max_tokens, reporter.say,
    )  # fmt: skip
    check_rewards(config.reward, prompts)
    job = Sampling(
        model=config.model,
        prompts=prompts,
        samples=config.samples,
        rollout=config.rollout,
        max_prompt_tokens=max(len(prompt.token_ids) for prompt in prompts),
        seed=config.run.seed,
    )
    run = Run.create(
        config.run.dir,
        config.run.name,
        "best-of-n",
        config,
        seed=config.run.seed,
        parents={"model": config.model.path, "data": config.data.prompts, **config.run.parents},
    )
    with run_session(run, reporter):
        with (
            sampling_cluster(config.cluster, config.rollout) as ray_info,
            reporter.stage(f"{config.samples} completions for each of {len(prompts)} prompts"),
        ):
            need = Need("a worker", {"GPU": config.rollout.gpus}, 1, keys={"GPU": "rollout.gpus"})
            require_resources([need], ray_info, reporter.say)
            with sampled_models([config.model], ray_info) as files:
                rollouts = sample_jobs([replace(job, files=files[0])])[0]
        with reporter.stage("scoring"):
            scores = scores_of(config.reward, [(config.model, rollouts)])[0]
        scored = [Scored(*pair) for pair in zip(rollouts, scores, strict=True)]
        reporter.say(headline(write_best(run.path, scored, config)))
    return run.path


def write_best(path: Path, scored: Sequence[Scored], config: BestOfNConfig) -> dict[str, Any]:
    """Writes the files of the run; returns its figures. Raises UserError if nothing is kept."""
    groups = [
        scored[first : first + config.samples] for first in range(0, len(scored), config.samples)
    ]
    kept = [best(group, config.keep, config.threshold) for group in groups]
    write_text(path / ALL, _lines([_row(one) for one in scored]))
    figures = figures_of(groups, kept, config)
    write_json(path / FIGURES, figures)
    if not any(kept):
        raise UserError(
            "no completion is kept: all were cut off at rollout.max_tokens or scored below "
            "threshold",
            where=str(path / ALL),
            fix="lower threshold, or raise rollout.max_tokens or samples",
        )
    write_text(path / BEST, _lines([_row(one) for group in kept for one in group]))
    return figures


def best(group: Sequence[Scored], keep: int, threshold: float | None) -> list[Scored]:
    """The completions of one prompt to learn from, the highest score first, no text twice.

    A completion that was cut off is none: SFT would learn to end there. Of equal scores, the one
    sampled first counts.
    """
    whole = {one.rollout.text: one for one in reversed(group) if not one.cut}
    enough = [one for one in whole.values() if threshold is None or one.score.value >= threshold]
    ordered = sorted(enough, key=lambda one: (-one.score.value, one.rollout.sample_index))
    return ordered[: keep or None]


def kl_bound(samples: int) -> float:
    """log n - (n - 1) / n: the KL of best-of-n to the policy it samples from is at most this, in
    nats per completion. Source: Stiennon et al. 2020, appendix G.3; that it is an upper bound:
    Beirami et al. 2024, theorem 1."""
    return math.log(samples) - (samples - 1) / samples


def figures_of(
    groups: Sequence[Sequence[Scored]], kept: Sequence[Sequence[Scored]], config: BestOfNConfig
) -> dict[str, Any]:
    everything = [one for group in groups for one in group]
    chosen = [one for group in kept for one in group]
    # With a threshold, prompts and completions drop out, and the bound no longer holds.
    bound = kl_bound(config.samples) if config.keep == 1 and config.threshold is None else None
    return {
        "prompts": len(groups),
        "prompts_without": sum(not group for group in kept),
        "samples": config.samples,
        "completions": len(everything),
        "cut": sum(one.cut for one in everything),
        "kept": len(chosen),
        "kl_bound": bound,
        "mean_score": statistics.fmean(one.score.value for one in everything),
        "mean_score_kept": _mean([one.score.value for one in chosen]),
        "mean_tokens": statistics.fmean(_tokens(one) for one in everything),
        "mean_tokens_kept": _mean([_tokens(one) for one in chosen]),
    }


def headline(figures: Mapping[str, Any]) -> str:
    bound = figures["kl_bound"]
    said = "" if bound is None else f"; KL to the model at most {bound:.2f} nats per completion"
    return (
        f"kept {figures['kept']} of {figures['completions']} completions: mean score "
        f"{figures['mean_score_kept']:+.3f} (all: {figures['mean_score']:+.3f}){said}"
    )


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _tokens(one: Scored) -> int:
    return len(one.rollout.completion.token_ids)


def _row(one: Scored) -> dict[str, Any]:
    parts = dict(one.score.parts)
    return {**answer_row(one.rollout), "score": one.score.value, "score_parts": parts}


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
