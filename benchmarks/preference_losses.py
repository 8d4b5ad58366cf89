"""Every way to train on preferences without PPO, on the same data: which policy is better?

    accord quickstart --name quickstart      # makes the task: SFT policy, pairs, reward model
    python benchmarks/preference_losses.py runs/quickstart --out table.json

Each method is run with the command that a user types and judged by `accord evaluate` with the
task's gold rule, on prompts that no training saw. KL and length are measured with one function for
all methods. The table is printed and written as JSON, with each method's settings.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GOLD = ROOT / "cluster" / "quickstart" / "helpdesk" / "gold.py"
MAX_TOKENS = 112  # prompt and completion together, as in the quickstart
COLUMNS = (
    *("accuracy_before", "accuracy", "win_rate", "ci_low", "ci_high"),
    *("length", "kl", "minutes"),
)

FIT: dict[str, Any] = {
    "fit.rows_per_step": 32,
    "fit.tokens_per_microbatch": 4096,
    "fit.max_tokens": MAX_TOKENS,
    "fit.eval_fraction": 0.15,
    "fit.eval_every": 1000,
    "fit.schedule": "linear",
    "fit.epochs": 2,
}
LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.1, "fit.lr": 2e-4},
    "ipo": {"beta": 0.1, "fit.lr": 2e-4},
    "kto": {"beta": 0.1, "fit.lr": 4e-4},
    "orpo": {"beta": 0.5, "fit.lr": 4e-4},
    "simpo": {"beta": 2.0, "target_margin": 1.0, "nll_coef": 0.1, "fit.lr": 2e-4},
}
BEST_OF = 8


@dataclass(frozen=True, slots=True)
class World:
    """A finished quickstart run, and where this benchmark works."""

    run: Path
    work: Path
    seed: int

    @property
    def start(self) -> Path:
        return self.run / "sft" / "policy"

    def data(self, name: str) -> Path:
        return self.run / "data" / name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("quickstart", type=Path, help="run directory of `accord quickstart`")
    parser.add_argument("--work", type=Path, default=Path("runs/preference_losses"))
    parser.add_argument("--out", type=Path, default=Path("preference_losses.json"))
    parser.add_argument("--methods", default=",".join([*LOSSES, "best-of-n", "ppo"]))
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    results = json.loads(given.out.read_text())["results"] if given.out.is_file() else []
    for seed in range(given.seeds):
        world = World(given.quickstart, given.work / f"seed{seed}", seed)
        for method in given.methods.split(","):
            results = [r for r in results if (r["method"], r["seed"]) != (method, seed)]
            results.append(run_method(world, method))
            content = {"task": "help desk", "best_of": BEST_OF, "fit": FIT, "results": results}
            given.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(table(results))


def run_method(world: World, method: str) -> dict[str, Any]:
    began = time.monotonic()
    how: Callable[[World], tuple[Path, dict[str, Any]]] = {
        "best-of-n": best_of_n,
        "ppo": ppo_of_quickstart,
    }.get(method, lambda world: preference_loss(world, method))
    policy, found = how(world)
    minutes = (time.monotonic() - began) / 60
    return {
        "method": method,
        "seed": world.seed,
        "minutes": round(minutes, 2),
        **found,
        **own_samples(world, policy),
        **gold_win_rate(world, method, policy),
    }


def preference_loss(world: World, loss: str) -> tuple[Path, dict[str, Any]]:
    settings = {**FIT, **LOSSES[loss]}
    run = command(world, "dpo", f"examples/{loss}.toml", loss, {
        "model.path": world.start, "data.path": world.data("pairs.jsonl"), "kl_samples": 0,
        **settings,
    })  # fmt: skip
    fit = json.loads((run / "fit.json").read_text())
    return run / "policy", {
        "settings": LOSSES[loss],
        "steps": fit["steps"],
        "accuracy_before": accuracy_before(run),
        "accuracy": fit["evaluation"]["eval/rewards/accuracies"],
    }


def accuracy_before(run: Path) -> float | None:
    """Share of held-out pairs that the starting policy has in the right order by what the loss
    calls the reward. None for a loss with a reference: all its rewards begin at 0."""
    import torch

    from cluster.contracts.config.file import load_config
    from cluster.contracts.config.offline import DpoConfig
    from learner.models.load import load_policy, load_tokenizer
    from learner.offline.dpo import DpoTask, read_preference_rows

    config = load_config(DpoConfig, str(run / "config.toml"))
    if config.uses_reference:
        return None
    held = read_preference_rows(config, load_tokenizer(config.model)).held
    task = DpoTask(load_policy(config.model), config, torch.device("cpu"))
    evaluate = task.evaluation(held)
    assert evaluate is not None
    found = {metric.name: metric.value for metric in evaluate()}
    return round(found["eval/rewards/accuracies"], 4)


def best_of_n(world: World) -> tuple[Path, dict[str, Any]]:
    best = command(world, "best-of-n", "examples/best_of_n.toml", "best", {
        "model.path": world.start,
        "data.prompts": world.data("rl_prompts.jsonl"),
        "reward.sources.0.path": world.run / "reward_model" / "reward_model",
        "samples": BEST_OF,
    })  # fmt: skip
    run = command(world, "sft", "examples/sft.toml", "best-sft", {
        "model.path": world.start, "data.path": best / "best.jsonl", **FIT, "fit.lr": 1e-3,
    })  # fmt: skip
    figures = json.loads((best / "best_of_n.json").read_text())
    steps = json.loads((run / "fit.json").read_text())["steps"]
    return run / "policy", {"settings": {"fit.lr": 1e-3}, "steps": steps, "best_of_n": figures}


def ppo_of_quickstart(world: World) -> tuple[Path, dict[str, Any]]:
    """The quickstart's own PPO policy, for comparison; its minutes are those of its PPO stage."""
    stages = json.loads((world.run / "stages.json").read_text())
    seconds = next(stage["seconds"] for stage in stages if stage["name"] == "ppo")
    return world.run / "policy", {"minutes": round(seconds / 60, 2)}


def command(world: World, name: str, config: str, run: str, settings: dict[str, Any]) -> Path:
    """Run `accord NAME CONFIG KEY=VALUE...`; the run directory that it makes."""
    values = {**settings, "run.dir": world.work, "run.name": run, "run.seed": world.seed}
    words = [f"{key}={value}" for key, value in values.items()]
    accord = [sys.executable, str(ROOT / "launch.py")]
    subprocess.run([*accord, name, str(ROOT / config), *words, "--quiet"], check=True)
    return world.work / run


def own_samples(world: World, policy: Path) -> dict[str, float]:
    """On held-out prompts: KL to the SFT policy in nats per completion, and tokens."""
    import torch

    from cluster.assembly.sampling import prompts_for
    from cluster.contracts.config.base import ModelConfig
    from cluster.contracts.config.offline import FitConfig
    from cluster.contracts.config.rollout import DataConfig
    from learner.models.load import load_policy, load_tokenizer
    from learner.offline.own_samples import measure_own_samples

    start = ModelConfig(path=str(world.start), dtype="float32")
    prompts = prompts_for(start, DataConfig(prompts=str(world.data("eval_prompts.jsonl"))), 0)
    found = measure_own_samples(
        load_policy(replace_path(start, policy)), load_policy(start), load_tokenizer(start),
        [prompt.token_ids for prompt in prompts], start, FitConfig(max_tokens=MAX_TOKENS),
        seed=world.seed, device=torch.device("cpu"),
    )  # fmt: skip
    return {name.removeprefix("eval/"): round(value, 3) for name, value in found.items()}


def replace_path(model: Any, path: Path) -> Any:
    return model.model_copy(update={"path": str(path)})


def gold_win_rate(world: World, method: str, policy: Path) -> dict[str, Any]:
    run = command(world, "evaluate", "examples/evaluate.toml", f"{method}-gold", {
        "policy.path": policy, "baseline.path": world.start,
        "data.prompts": world.data("eval_prompts.jsonl"),
        "judge.sources.0.path": f"{GOLD}:gold", "judge.sources.0.name": "gold",
        "tie_margin": 0.01, "rollout.gpus": 0,
    })  # fmt: skip
    record = json.loads((run / "evaluation.json").read_text())
    names = ("win_rate", "ci_low", "ci_high", "mean_score_policy", "mean_score_baseline")
    return {name: round(record[name], 4) for name in names}


def table(results: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'method':10} seed " + " ".join(f"{name:>15}" for name in COLUMNS)]
    for row in results:
        cells = " ".join(
            f"{row[name]:15.3f}" if isinstance(row.get(name), int | float) else f"{'-':>15}"
            for name in COLUMNS
        )
        lines.append(f"{row['method']:10} {row['seed']:4} {cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
