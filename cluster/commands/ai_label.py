"""`accord ai-label`."""

from __future__ import annotations

from cluster.commands.options import Config, Overrides, Quiet, load, print_path, reporter


def ai_label(config: Config, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Have an AI judge compare completions.

    The judgements go into a preference store. Each pair is shown in both orders. The report says
    how far the judge agrees with people.

    Example: `accord ai-label examples/ai_label.toml judge.model=NAME`
    """
    from cluster.assembly.ai_label import run_ai_label
    from cluster.contracts.config.ai_label import AiLabelConfig

    settings = load(AiLabelConfig, config, overrides, "ai-label")
    print_path(run_ai_label(settings, reporter(quiet)))
