"""`accord sft`."""

from __future__ import annotations

from cluster.commands.options import OptionalConfig, Overrides, Quiet, Resume, fit_or_resume


def sft(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    resume: Resume = None,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model on demonstrations.

    The loss counts only the assistant's tokens.

    Example: `accord sft examples/sft.toml model.path=my-model fit.epochs=2`

    Example: `accord sft --resume runs/my-sft`
    """
    from cluster.contracts.config.offline import SftConfig

    words = (config, overrides, resume, quiet)
    fit_or_resume(words, "sft", SftConfig)
