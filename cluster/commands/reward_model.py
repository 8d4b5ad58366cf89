"""`accord reward-model`."""

from __future__ import annotations

from cluster.commands.options import OptionalConfig, Overrides, Quiet, Resume, fit_or_resume


def reward_model(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    resume: Resume = None,
    quiet: Quiet = False,
) -> None:
    """Train a reward model on comparisons of completions.

    A row holds a prompt, the chosen and the rejected completion.

    Example: `accord reward-model examples/reward_model.toml data.path=pairs.jsonl`

    Example: `accord reward-model --resume runs/my-reward-model`
    """
    from cluster.contracts.config.offline import RewardModelConfig

    words = (config, overrides, resume, quiet)
    fit_or_resume(words, "reward-model", RewardModelConfig)
