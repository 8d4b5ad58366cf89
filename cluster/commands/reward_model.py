"""`accord reward-model`."""

from __future__ import annotations

from cluster.commands.options import (
    OptionalConfig,
    Overrides,
    Quiet,
    Resume,
    load,
    print_path,
    reporter,
    resume_overrides,
)


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
    from cluster.assembly.offline import resume_offline, run_reward_model
    from cluster.contracts.config.offline import RewardModelConfig

    if resume is not None:
        words = resume_overrides(config, overrides)
        print_path(resume_offline("reward-model", str(resume), words, reporter(quiet)))
        return
    settings = load(RewardModelConfig, config, overrides, "reward-model")
    print_path(run_reward_model(settings, reporter(quiet)))
