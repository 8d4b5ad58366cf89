"""Every way to learn from preferences, from the same pairs and the same start: which policy is
better, how far from the start is it, and what did it cost?

    python benchmarks/methods.py --seeds 0,1,2 --out table.json                # all methods
    python benchmarks/methods.py --seeds 0 --out table.json --methods kto,ppo  # into the same table

The base is the help-desk task of `accord quickstart` with a smaller model: a fine-tuned policy,
pairs labelled by its simulated annotators, and a reward model that learnt from these pairs. Each
method trains with the command that a user types, which starts vLLM and Ray where it samples.
Judged are completions for prompts that no training saw: by the task's gold rule against the
starting policy (win rate), by their length, and by their KL to that policy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from commands import run_once  # noqa: E402
from helpdesk_base import (  # noqa: E402
    MAX_ANSWER_TOKENS,
    MAX_PROMPT_TOKENS,
    BaseSize,
    Sampler,
    ensure_base,
    prompts_of,
)
from record import provenance  # noqa: E402

SIZE = BaseSize(
    heads=3,  # of 32 numbers each: vLLM on CPU computes no heads of 24
    demonstrations=10000, preference_prompts=900, rl_prompts=400, eval_prompts=200,
)  # fmt: skip
RUNNING = 200
JUDGED_PER_PROMPT = 2
BEST_OF = 8
TIE_MARGIN = 0.01
FIT: dict[str, Any] = {
    "fit.threads": 1,
    "fit.rows_per_step": 32,
    "fit.tokens_per_microbatch": 4096,
    "fit.max_tokens": 128,  # prompt and completion together
    "fit.eval_fraction": 0.15,
    "fit.eval_every": 1000,
    "fit.schedule": "linear",
    "fit.epochs": 2,
    "fit.lr": 3e-4,
}
LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.1},
    "ipo": {"beta": 0.1},
    "kto": {"beta": 0.1},
    "orpo": {"beta": 1.0},
    "simpo": {"beta": 2.0, "target_margin": 1.0, "nll_coef": 0.1},
}
TRAIN: dict[str, Any] = {
    "data.max_prompt_tokens": MAX_PROMPT_TOKENS,
    "batch.prompts_per_step": 32,
    "batch.samples_per_prompt": 4,
    "batch.steps": 60,
    "rollout.max_tokens": MAX_ANSWER_TOKENS,
    "rollout.gpus": 0,
    "rollout.start_timeout_s": 900,
    "algorithm.missing_eos_penalty": 1.0,
    "learner.gpus": 0,
    "learner.lr": 4e-4,
    "learner.warmup_steps": 8,
    "learner.minibatches": 4,
}
PPO: dict[str, Any] = {"algorithm.advantage": "gae", "algorithm.kl.coef": 0.08}
GRPO: dict[str, Any] = {
    "algorithm.advantage": "grpo",
    "algorithm.kl.place": "loss",
    "algorithm.kl.estimator": "k3+",
    "algorithm.kl.coef": 0.5,
    "learner.value_path": "none",
}


@dataclass(frozen=True, slots=True)
class World:
    """The base, and where this benchmark works."""

    base: Path
    work: Path
    seed: int

    @property
    def start(self) -> Path:
        return self.base / "policy"

    def run(
        self, command: str, config: str, name: str, settings: dict[str, Any]
    ) -> tuple[Path, float]:
        """The run directory of `accord COMMAND examples/CONFIG`, and its CPU minutes."""
        run = self.work / name
        values = {"model.path": self.start, **settings, "run.seed": self.seed}
        return run, run_once(command, f"examples/{config}", run, values)


@dataclass(frozen=True, slots=True)
class Trained:
    policy: Path
    cpu_minutes: float
    settings: dict[str, Any]
    steps: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "methods")
    parser.add_argument("--out", type=Path, default=Path("methods.json"))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    base = ensure_base((given.work / "base").absolute(), SIZE)
    results = json.loads(given.out.read_text())["results"] if given.out.is_file() else []
    for seed in map(int, given.seeds.split(",")):
        world = World(base, (given.work / f"seed{seed}").absolute(), seed)
        for method in filter(None, given.methods.split(",")):
            results = [r for r in results if (r["method"], r["seed"]) != (method, seed)]
            results.append({"method": method, "seed": seed, **measured(world, METHODS[method])})
            results.sort(key=lambda r: ([*METHODS].index(r["method"]), r["seed"]))
            content = {**provenance(), **about(base), "results": results}
            given.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    print(table(results))


def about(base: Path) -> dict[str, Any]:
    return {
        "task": "help desk, as in accord quickstart, with a smaller model",
        "base": json.loads((base / "base.json").read_text()),
        "fit": FIT,
        "train": TRAIN,
    }


def measured(world: World, method: Callable[[World], Trained]) -> dict[str, Any]:
    trained = method(world)
    return {
        "cpu_minutes": trained.cpu_minutes,
        "settings": trained.settings,
        "steps": trained.steps,
        **judge(world, trained.policy),
    }


def nothing(world: World) -> Trained:
    """The starting policy against completions of its own: what a win rate of no change looks
    like."""
    return Trained(world.start, 0.0, {})


def sft_on_chosen(world: World) -> Trained:
    data = {"data.path": world.base / "pairs.jsonl"}
    run, minutes = world.run("sft", "sft.toml", "sft-chosen", {**data, **FIT})
    return Trained(run / "policy", minutes, {}, steps_of(run))


def best_of_n(world: World) -> Trained:
    reward = {"reward.sources.0.path": world.base / "reward_model"}
    sampling = {
        "data.prompts": world.base / "rl_prompts.jsonl",
        "data.max_prompt_tokens": MAX_PROMPT_TOKENS,
        "rollout.max_tokens": MAX_ANSWER_TOKENS,
        "rollout.gpus": 0,
        "rollout.start_timeout_s": 900,
        "samples": BEST_OF,
    }
    best, sampled = world.run("best-of-n", "best_of_n.toml", "best", {**sampling, **reward})
    data = {"data.path": best / "best.jsonl"}
    run, fitted = world.run("sft", "sft.toml", "best-sft", {**data, **FIT})
    return Trained(run / "policy", sampled + fitted, {"samples": BEST_OF}, steps_of(run))


def preference_loss(world: World, loss: str) -> Trained:
    data = {"loss": loss, "data.path": world.base / "pairs.jsonl"}
    run, minutes = world.run("dpo", f"{loss}.toml", loss, {**data, **FIT, **LOSSES[loss]})
    return Trained(run / "policy", minutes, LOSSES[loss], steps_of(run))


def reinforced(world: World, name: str, settings: dict[str, Any]) -> Trained:
    reward = world.base / "reward_model"
    run, minutes = world.run("train", "ppo_reward_model.toml", name, {
        "data.prompts": world.base / "rl_prompts.jsonl",
        "reward.sources.0.path": reward,
        "learner.value_path": reward,
        **TRAIN, **settings,
    })  # fmt: skip
    return Trained(run / "policy", minutes, settings, TRAIN["batch.steps"])


METHODS: dict[str, Callable[[World], Trained]] = {
    "start": nothing,
    "sft-chosen": sft_on_chosen,
    "best-of-n": best_of_n,
    **{loss: partial(preference_loss, loss=loss) for loss in LOSSES},
    "grpo": partial(reinforced, name="grpo", settings=GRPO),
    "ppo": partial(reinforced, name="ppo", settings=PPO),
}


def steps_of(run: Path) -> int:
    return int(json.loads((run / "fit.json").read_text())["steps"])


def judge(world: World, policy: Path) -> dict[str, Any]:
    """Gold win rate over the starting policy with its interval, length, KL, on held-out prompts."""
    from learner.evaluation.win_rate import win_rate

    source = prompts_of(world.base, "eval")
    prompts = [source.prompt(n) for n in range(len(source))]
    after, lengths = gold_scores(policy, prompts, "after", world.seed)
    before, lengths_before = gold_scores(world.start, prompts, "before", world.seed)
    pairs = list(zip(after, before, strict=True))
    ids = [prompt.id for prompt in prompts for _ in range(JUDGED_PER_PROMPT)]
    rate = win_rate(pairs, ids, tie_margin=TIE_MARGIN, seed=world.seed)
    return {
        **rate.as_record(),
        "gold": statistics.fmean(after),
        "gold_before": statistics.fmean(before),
        "length": statistics.fmean(lengths),
        "length_before": statistics.fmean(lengths_before),
        **kl_to_start(world, policy, prompts),
    }


def gold_scores(
    policy: Path, prompts: Sequence[Any], *seed: int | str
) -> tuple[list[float], list[float]]:
    """(gold score, tokens) of the completions, those of one prompt beside each other."""
    from cluster.quickstart.helpdesk.gold import gold

    sampler = Sampler(policy, RUNNING)
    done = sampler.answers(prompts, JUDGED_PER_PROMPT, "judge", *seed)
    asked = [prompt for prompt in prompts for _ in range(JUDGED_PER_PROMPT)]
    columns: dict[str, list[Any]] = {
        name: [prompt.metadata[name] for prompt in asked] for name in ("kind", "product", "topic")
    }
    texts = [sampler.text(completion) for completion in done]
    scores = gold(prompts=asked, completions=texts, **columns)
    return scores, [float(len(completion.token_ids)) for completion in done]


def kl_to_start(world: World, policy: Path, prompts: Sequence[Any]) -> dict[str, float]:
    """kl and kl_error in nats per completion: log pi - log start, summed over the tokens of
    completions that the policy samples, mean over prompts."""
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
    """The Markdown table of docs/results.md: means over the seeds; the interval is that of the
    first seed, and the seeds' win rates stand beside it."""
    lines = [
        "| method | gold win rate (95 % interval, seed 0) | other seeds | gold score | length "
        "| KL | CPU minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(row["method"] for row in results):
        rows = [row for row in results if row["method"] == method]
        first, others = rows[0], [f"{row['win_rate']:.3f}" for row in rows[1:]]
        means = {
            key: statistics.fmean(row[key] for row in rows)
            for key in ("gold", "length", "kl", "cpu_minutes")
        }
        lines.append(
            f"| {method} | {first['win_rate']:.3f} ({first['ci_low']:.3f} to "
            f"{first['ci_high']:.3f}) | {', '.join(others) or '-'} | {means['gold']:.2f} "
            f"| {means['length']:.1f} | {means['kl']:.1f} | {means['cpu_minutes']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
