"""`accord best-of-n`."""

from __future__ import annotations

from cluster.commands.options import Config, Overrides, Quiet, load, print_path, reporter


def best_of_n(config: Config, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Sample completions per prompt and keep the best-rewarded.

    The config's rewards score them. The run's best.jsonl holds demonstrations for `accord sft`.

    Example: `accord best-of-n examples/best_of_n.toml samples=16 run.name=best`

    Example: `accord sft examples/sft.toml data.path=runs/best/best.jsonl`
    """
    from cluster.assembly.best_of_n import run_best_of_n
    from cluster.contracts.config.best_of_n import BestOfNConfig

    settings = load(BestOfNConfig, config, overrides, "best-of-n")
    print_path(run_best_of_n(settings, reporter(quiet)))
