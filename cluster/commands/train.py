"""`accord train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cluster.commands.options import OptionalConfig, Overrides, Quiet, Resume, begin_or_resume

if TYPE_CHECKING:
    from cluster.contracts.config.train import TrainConfig
    from cluster.runs.console import Reporter


def train(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    resume: Resume = None,
    quiet: Quiet = False,
) -> None:
    """Train a policy with PPO, GRPO, RLOO or REINFORCE++ on Ray.

    Rollout workers generate completions with vLLM while the learner trains on earlier ones.

    Example: `accord train examples/ppo.toml batch.steps=200 staleness.bound=2`

    Example: `accord train --resume runs/my-run batch.steps=400`
    """
    from cluster.contracts.config.train import TrainConfig

    words = (config, overrides, resume, quiet)
    begin_or_resume(words, "train", TrainConfig, _begin, _resume)


def _begin(config: TrainConfig, reporter: Reporter) -> Path:
    """As `accord.train`, but this process is the command's own, so it may import as roles do."""
    from cluster.assembly.forked_roles import forked_roles
    from cluster.machine.imports import quick_imports
    from cluster.runs.start_log import StartLog

    start = StartLog(reporter)
    with forked_roles(config.cluster, compiled=config.learner.compile):
        with start.part("torch and transformers"), quick_imports():
            from cluster.assembly.training import train_policy
        return train_policy(config, reporter, start=start)


def _resume(path: str, overrides: list[str], reporter: Reporter) -> Path:
    from cluster.assembly.training_resume import resume_training

    return resume_training(path, overrides, reporter)
