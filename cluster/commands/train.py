"""`accord train`."""

from __future__ import annotations

from cluster.commands.options import OptionalConfig, Overrides, Quiet, Resume, begin_or_resume


def train(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    resume: Resume = None,
    quiet: Quiet = False,
) -> None:
    """Train a policy with PPO, GRPO, RLOO or a relative, on Ray.

    Rollout workers generate completions with vLLM while the learner trains on earlier ones.

    Example: `accord train examples/ppo.toml batch.steps=200 staleness.bound=2`

    Example: `accord train --resume runs/my-run batch.steps=400`
    """
    from cluster.assembly.training import resume_training, train_policy
    from cluster.contracts.config.train import TrainConfig

    words = (config, overrides, resume, quiet)
    begin_or_resume(words, "train", TrainConfig, train_policy, resume_training)
