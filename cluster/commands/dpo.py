"""`accord dpo`."""

from __future__ import annotations

from cluster.commands.options import OptionalConfig, Overrides, Quiet, Resume, fit_or_resume


def dpo(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    resume: Resume = None,
    quiet: Quiet = False,
) -> None:
    """Train a policy on preferences: DPO, IPO, KTO, ORPO or SimPO.

    A row holds a prompt, the chosen and the rejected completion. For KTO it may also hold one
    completion with a label. No reward model is needed.

    Example: `accord dpo examples/dpo.toml data.path=pairs.jsonl beta=0.2`

    Example: `accord dpo examples/kto.toml data.path=judged.jsonl`

    Example: `accord dpo --resume runs/my-dpo`
    """
    from cluster.contracts.config.offline import DpoConfig

    words = (config, overrides, resume, quiet)
    fit_or_resume(words, "dpo", DpoConfig)
