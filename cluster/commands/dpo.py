"""`accord dpo`."""

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


def dpo(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    resume: Resume = None,
    quiet: Quiet = False,
) -> None:
    """Train a policy directly on comparisons (DPO).

    A row holds a prompt, the chosen and the rejected completion. No reward model is needed.

    Example: `accord dpo examples/dpo.toml data.path=pairs.jsonl beta=0.2`

    Example: `accord dpo --resume runs/my-dpo`
    """
    from cluster.assembly.offline import resume_offline, run_dpo
    from cluster.contracts.config.offline import DpoConfig

    if resume is not None:
        words = resume_overrides(config, overrides)
        print_path(resume_offline("dpo", str(resume), words, reporter(quiet)))
        return
    print_path(run_dpo(load(DpoConfig, config, overrides, "dpo"), reporter(quiet)))
