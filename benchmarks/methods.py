"""Every way to learn from preferences without reinforcement learning, on the same data: which
policy is better?

    python benchmarks/preference_losses.py --out table.json                # all methods
    python benchmarks/preference_losses.py --out table.json --methods kto  # one more, same table

The base is that of `staleness_curves.py`: the help-desk task of `accord quickstart` with a smaller
model and less data, on one core. Each method trains with the command that a user types (`accord
dpo`, `accord sft`). Judged are completions for prompts that no training saw: by the task's gold
rule against the starting policy (win rate), by their length, and by their KL to that policy.
Completions come from the engine on transformers, so that nothing but this process is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from staleness_base import MAX_ANSWER_TOKENS, BaseSize, Sampler, ensure_base, prompts_of  # noqa: E402

SIZE = BaseSize(demonstrations=10000, preference_prompts=900, rl_prompts=400, eval_prompts=200)
RUNNING = 200
BEST_OF = 8
MAX_TOKENS = 128  # prompt and completion together
TIE_MARGIN = 0.01
COLUMNS = (
    *("accuracy_before", "accuracy", "win_rate", "ci_low", "ci_high"),
    *("length", "kl", "cpu_minutes"),
)
FIT: dict[str, Any] = {
    "fit.threads": 1,
    "fit.rows_per_step": 32,
    "fit.tokens_per_microbatch": 4096,
    "fit.max_tokens": MAX_TOKENS,
    "fit.eval_fraction": 0.15,
    "fit.eval_every": 1000,
    "fit.schedule": "linear",
    "fit.epochs": 2,
}
LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.1, "fit.lr": 3e-4},
    "ipo": {"beta": 0.1, "fit.lr": 3e-4},
    "kto": {"beta": 0.1, "fit.lr": 3e-4},
    "orpo": {"beta": 1.0, "fit.lr": 3e-4},
    "simpo": {"beta": 2.0, "target_margin": 1.0, "nll_coef": 0.1, "fit.lr": 3e-4},
}
BEST_SFT = {"fit.lr": 3e-4}


@dataclass(frozen=True, slots=True)
class World:
    """The base, and where this benchmark works."""

    base: Path
    work: Path
    seed: int

    @property
    def start(self) -> Path:
        return self.base / "policy"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, default=Path("runs/preference_losses"))
    parser.add_argument("--out", type=Path, default=Path("preference_losses.json"))
    parser.add_argument("--methods", default=",".join([*LOSSES, "best-of-n"]))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    base = ensure_base((given.work / "base").absolute(), SIZE)
    world = World(base, (given.work / f"seed{given.seed}").absolute(), given.seed)
    results = json.loads(given.out.read_text())["results"] if given.out.is_file() else []
    for method in filter(None, given.methods.split(",")):
        results = [r for r in results if (r["method"], r["seed"]) != (method, given.seed)]
        results.append(run_method(world, method))
        content = {
            "task": "help desk, as in accord quickstart, with a smaller model",
            "base": json.loads((base / "base.json").read_text()),
            "fit": FIT,
            "results": results,
        }
        given.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(table(results))


def run_method(world: World, method: str) -> dict[str, Any]:
    began = cpu_seconds()
    policy, found = best_of_n(world) if method == "best-of-n" else preference_loss(world, method)
    minutes = (cpu_seconds() - began) / 60
    judged = judge(world, policy)
    return {"method": method, "seed": world.seed, "cpu_minutes": minutes, **found, **judged}


def cpu_seconds() -> float:
    """Of this process and of all that it has waited for."""
    times = os.times()
    return float(sum(times[:4]))


def preference_loss(world: World, loss: str) -> tuple[Path, dict[str, Any]]:
    settings = {"loss": loss, **FIT, **LOSSES[loss]}
    run = command(world, "dpo", f"examples/{loss}.toml", loss, {
        "model.path": world.start, "data.path": world.base / "pairs.jsonl", **settings,
    })  # fmt: skip
    fit = json.loads((run / "fit.json").read_text())
    return run / "policy", {
        "settings": LOSSES[loss],
        "steps": fit["steps"],
        "pairs_trained": fit["rows"],
        "pairs_held_out": fit["rows_held_out"],
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
    return found["eval/rewards/accuracies"]


def best_of_n(world: World) -> tuple[Path, dict[str, Any]]:
    """What `accord best-of-n` and `accord sft` do, with the engine on transformers."""
    from cluster.assembly.best_of_n import Scored, write_best
    from cluster.assembly.judging import scores_of
    from cluster.contracts.config.best_of_n import BestOfNConfig
    from cluster.contracts.records import Rollout

    config = BestOfNConfig.model_validate({
        "model": {"path": str(world.start)},
        "data": {"prompts": str(world.base / "rl_prompts.jsonl")},
        "reward": {"sources": [{"type": "model", "path": str(world.base / "reward_model")}]},
        "samples": BEST_OF,
    })  # fmt: skip
    source = prompts_of(world.base, "rl")
    prompts = [source.prompt(n) for n in range(len(source))]
    sampler = Sampler(world.start, RUNNING)
    done = sampler.answers(prompts, BEST_OF, "best", world.seed)
    rollouts = [
        Rollout(prompt=prompts[i // BEST_OF], completion=completion, sample_index=i % BEST_OF,
                text=sampler.text(completion))
        for i, completion in enumerate(done)
    ]  # fmt: skip
    scores = scores_of(config.reward, [(config.model, rollouts)])[0]
    folder = world.work / "best"
    folder.mkdir(parents=True, exist_ok=True)
    scored = [Scored(*pair) for pair in zip(rollouts, scores, strict=True)]
    figures = write_best(folder, scored, config)
    run = command(world, "sft", "examples/sft.toml", "best-sft", {
        "model.path": world.start, "data.path": folder / "best.jsonl", **FIT, **BEST_SFT,
    })  # fmt: skip
    steps = json.loads((run / "fit.json").read_text())["steps"]
    return run / "policy", {"settings": BEST_SFT, "steps": steps, "best_of_n": figures}


def command(world: World, name: str, config: str, run: str, settings: dict[str, Any]) -> Path:
    """Run `accord NAME CONFIG KEY=VALUE...`; the run directory that it makes."""
    values = {**settings, "run.dir": world.work, "run.name": run, "run.seed": world.seed}
    words = [f"{key}={value}" for key, value in values.items()]
    launch = [sys.executable, str(ROOT / "launch.py")]
    subprocess.run([*launch, name, str(ROOT / config), *words, "--quiet"], check=True)
    return world.work / run


def judge(world: World, policy: Path) -> dict[str, Any]:
    """Gold win rate over the starting policy with its interval, length, KL, on held-out prompts."""
    from learner.evaluation.win_rate import win_rate

    source = prompts_of(world.base, "eval")
    prompts = [source.prompt(n) for n in range(len(source))]
    after, lengths = gold_scores(policy, prompts, world.seed)
    before, lengths_before = gold_scores(world.start, prompts, world.seed)
    pairs = list(zip(after, before, strict=True))
    rate = win_rate(pairs, [p.id for p in prompts], tie_margin=TIE_MARGIN, seed=world.seed)
    return {
        **rate.as_record(),
        "gold": statistics.fmean(after),
        "gold_before": statistics.fmean(before),
        "length": statistics.fmean(lengths),
        "length_before": statistics.fmean(lengths_before),
        **kl_to_start(world, policy, prompts),
    }


def gold_scores(policy: Path, prompts: Sequence[Any], seed: int) -> tuple[list[float], list[float]]:
    """(gold score, tokens) of one completion per prompt."""
    from cluster.quickstart.helpdesk.gold import gold

    sampler = Sampler(policy, RUNNING)
    done = sampler.answers(prompts, 1, "judge", seed)
    columns: dict[str, list[Any]] = {
        name: [prompt.metadata[name] for prompt in prompts] for name in ("kind", "product", "topic")
    }
    texts = [sampler.text(completion) for completion in done]
    scores = gold(prompts=list(prompts), completions=texts, **columns)
    return scores, [float(len(completion.token_ids)) for completion in done]


def kl_to_start(world: World, policy: Path, prompts: Sequence[Any]) -> dict[str, float]:
    """kl and kl_error in nats per completion."""
    import torch

    from cluster.contracts.config.base import ModelConfig
    from cluster.contracts.config.offline import FitConfig
    from learner.models.load import load_policy, load_tokenizer
    from learner.offline.own_samples import measure_own_samples

    start = ModelConfig(path=str(world.start), dtype="float32")
    longest = max(len(prompt.token_ids) for prompt in prompts) + MAX_ANSWER_TOKENS
    found = measure_own_samples(
        load_policy(ModelConfig(path=str(policy), dtype="float32")), load_policy(start),
        load_tokenizer(start), [prompt.token_ids for prompt in prompts], start,
        FitConfig(max_tokens=longest), seed=world.seed, device=torch.device("cpu"),
    )  # fmt: skip
    return {"kl": found["eval/kl"], "kl_error": found["eval/kl_error"]}


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
    main()
