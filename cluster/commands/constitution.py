"""`accord constitution`."""

from __future__ import annotations

from cluster.commands.options import Config, Overrides, Quiet, load, print_path, reporter


def constitution(config: Config, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Revise and compare completions by written principles.

    The run's sft.jsonl holds the revised completions for `accord sft`. The comparisons go into a
    preference store.

    Example: `accord constitution examples/constitution.toml judge.model=NAME`
    """
    from cluster.assembly.constitution import run_constitution
    from cluster.contracts.config.constitution import ConstitutionConfig

    settings = load(ConstitutionConfig, config, overrides, "constitution")
    print_path(run_constitution(settings, reporter(quiet)))
