"""`accord evaluate`."""

from __future__ import annotations

from cluster.commands.options import Config, Overrides, Quiet, load, print_path, reporter


def evaluate(config: Config, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Compare two policies on the same prompts: the win rate.

    The judge in the config scores the completions of both. The win rate comes with a confidence
    interval.

    Example: `accord evaluate examples/evaluate.toml policy.path=runs/q/policy`
    """
    from cluster.assembly.evaluation import run_evaluation
    from cluster.contracts.config.evaluate import EvaluateConfig

    settings = load(EvaluateConfig, config, overrides, "evaluate")
    print_path(run_evaluation(settings, reporter(quiet)))
