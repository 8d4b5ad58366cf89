"""`accord sft`."""

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


def sft(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    resume: Resume = None,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model on demonstrations.

    Only the assistant's tokens carry loss.

    Example: `accord sft examples/sft.toml model.path=my-model fit.epochs=2`

    Example: `accord sft --resume runs/my-sft`
    """
    from cluster.assembly.offline import resume_offline, run_sft
    from cluster.contracts.config.offline import SftConfig

    if resume is not None:
        words = resume_overrides(config, overrides)
        print_path(resume_offline("sft", str(resume), words, reporter(quiet)))
        return
    print_path(run_sft(load(SftConfig, config, overrides, "sft"), reporter(quiet)))
