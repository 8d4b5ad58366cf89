"""`accord evaluate --frontier RUN`: what each checkpoint of a run has gained, and how far it has
moved for it: the judge's score and the run's own reward against sqrt(KL)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.assembly.contest import Written
from cluster.assembly.judging import scores_of
from cluster.contracts.config.base import ModelConfig
from cluster.contracts.config.evaluate import BASELINE, EvaluateConfig
from cluster.contracts.config.file import load_config, toml_value
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import AccordError, UserError
from cluster.contracts.records import Rollout
from cluster.runs.checkpoints import in_order, step_of

TOKENS_AT_ONCE = 8192  # of one forward pass


@dataclass(frozen=True, slots=True)
class Frontier:
    """``steps``: of the checkpoints, by the name of their policy."""

    run: Path
    steps: Mapping[str, int]


def frontier_of(run: Path) -> tuple[Frontier, list[str]]:
    """The checkpoints of a run of `accord train`, and the settings of an evaluation that compares
    each of them with the policy that the run started from. Raises UserError without checkpoints."""
    config = _train_config(run)
    found = {
        f"step {step_of(folder.name)}": folder
        for folder in in_order(run / "checkpoints")
        if step_of(folder.name) > 0 and (folder / "policy").is_dir()
    }
    if not found:
        raise UserError(
            "holds no checkpoint of a trained policy",
            where=str(run),
            fix="give a run of `accord train`; checkpoint.keep says how many it keeps",
        )
    policies = [{"name": name, "path": str(path / "policy")} for name, path in found.items()]
    start = config.learner.reference_path or config.model.path
    words = [f"policies={toml_value(policies)}", "policy=none", f"baseline.path={start}"]
    steps = {name: step_of(path.name) for name, path in found.items()}
    return Frontier(run, steps), words


def frontier_rows(
    config: EvaluateConfig, frontier: Frontier, written: Written, record: Mapping[str, Any]
) -> dict[str, Any]:
    """For evaluation.json. ``kl``: nats per completion to the start, the mean over the policy's own
    completions, with its standard error. ``reward``: by the run's own sources; None, with
    ``frontier_note``, where they cannot be had here."""
    reference = _model(config.contestants[BASELINE])
    scores = {one["policy"]: one["mean_score"] for one in record["policies"]}
    rewards, note = _rewards(config, frontier, written)
    rows = []
    for n, name in enumerate(written.names):
        if name == BASELINE:
            kl, error, step = 0.0, 0.0, 0
        else:
            kl, error = kl_to(reference, config.contestants[name], written.of(n))
            step = frontier.steps[name]
        rows.append(
            {
                "policy": name,
                "step": step,
                "kl": kl,
                "kl_error": error,
                "distance": math.sqrt(max(0.0, kl)),
                "score": scores[name],
                "reward": rewards.get(name),
            }
        )
    rows.sort(key=lambda row: row["step"])
    return {"frontier": rows, "frontier_run": str(frontier.run), "frontier_note": note}


def kl_to(reference: Any, policy: ModelConfig, rollouts: Sequence[Rollout]) -> tuple[float, float]:
    """(mean of log pi - log ref over the policy's completions, its standard error), both at
    temperature 1, whatever the completions were sampled at."""
    own = _logps(_model(policy), rollouts)
    ratios = [a - b for a, b in zip(own, _logps(reference, rollouts), strict=True)]
    error = statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else 0.0
    return statistics.fmean(ratios), error


def _logps(model: Any, rollouts: Sequence[Rollout]) -> list[float]:
    from learner.compute.microbatches import token_row
    from learner.offline.completion_logps import all_completion_logps

    rows = []
    for rollout in rollouts:
        prompt, completion = rollout.prompt.token_ids, rollout.completion.token_ids
        mask = [False] * len(prompt) + [True] * len(completion)
        rows.append(token_row([*prompt, *completion], mask))
    return all_completion_logps(model, rows, "float32", _device(), TOKENS_AT_ONCE)


def _model(config: ModelConfig) -> Any:
    from cluster.machine.torch_state import prepare_torch
    from learner.models.load import load_policy

    prepare_torch()
    return load_policy(config).eval().to(_device())


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _rewards(
    config: EvaluateConfig, frontier: Frontier, written: Written
) -> tuple[dict[str, float], str]:
    """Mean reward of each policy by the sources that the run was trained with, and why there is
    none."""
    rewards = _train_config(frontier.run).reward
    if rewards.address or not rewards.sources:
        return {}, "The run's reward came from a service, which this command does not ask."
    try:
        scored = scores_of(
            rewards,
            [(config.contestants[name], written.of(n)) for n, name in enumerate(written.names)],
        )
    except AccordError as problem:  # a file that is gone, a column that these prompts lack
        return {}, f"The run's reward cannot be computed here: {problem}"
    means = [statistics.fmean(score.value for score in own) for own in scored]
    return dict(zip(written.names, means, strict=True)), ""


def _train_config(run: Path) -> TrainConfig:
    path = run / "config.toml"
    if not (run / "checkpoints").is_dir() or not path.is_file():
        raise UserError(
            "is no run of `accord train`", where=str(run), fix="give a run with checkpoints"
        )
    return load_config(TrainConfig, str(path))
