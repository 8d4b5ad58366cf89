"""Gao, Schulman, Hilton 2022, "Scaling laws for reward model overoptimization", on the help-desk
task: what gold and proxy reward do as a policy moves away from its start.

    python benchmarks/overoptimisation.py --out FILE.json --plot FILE.svg   # all
    python benchmarks/overoptimisation.py --quick                           # a smoke test

Gold is the task's rule for a good completion. The proxies are reward models that learnt from more
and more pairs labelled by simulated annotators, who imitate the rule with noise. Best-of-n takes
one pool of completions per prompt and estimates every n from it without bias. PPO is `accord train`
without a KL penalty, on Ray and vLLM; its points are means over a few learner steps. Both use the
same prompts, which no reward model learnt from, and the same centre: the mean score of the pool.

What was made lies in the folder of --work and is not made again: remove a part to repeat it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
from commands import run_once  # noqa: E402
from helpdesk_base import (  # noqa: E402
    MAX_ANSWER_TOKENS,
    MAX_PROMPT_TOKENS,
    BaseSize,
    Sampler,
    ensure_base,
    prompts_of,
)
from methods import FIT, SIZE  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from overoptimisation_curves import (  # noqa: E402
    Curve,
    best_of_n_curve,
    ppo_curve,
    results_of,
    table,
    write_plot,
)
from record import provenance  # noqa: E402

from cluster.runs.artefacts import artefact_hash  # noqa: E402

GOLD = "gold"
MICROBATCH_TOKENS = 4096
RUNNING = 500  # completions at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is run. pairs: those that each proxy learns from, and how often it reads them."""

    base: BaseSize = SIZE
    prompts: int = 150
    pool: int = 100
    pairs: tuple[tuple[int, int], ...] = ((100, 8), (400, 4), (1600, 2))
    steps: int = 60


QUICK = Scale(
    base=BaseSize(
        hidden=64, heads=2, layers=2, intermediate=96, demonstrations=3000,
        preference_prompts=120, rl_prompts=64, eval_prompts=24,
    ),
    prompts=16, pool=16, pairs=((50, 2), (100, 2), (150, 2)), steps=18,
)  # fmt: skip
REWARD_FIT: dict[str, Any] = {
    **FIT,
    "fit.lr": 7e-4,
    "fit.weight_decay": 0.01,
    "fit.rows_per_step": 16,
    "fit.eval_fraction": 0.0,
}
PPO: dict[str, Any] = {
    "data.max_prompt_tokens": MAX_PROMPT_TOKENS,
    "batch.prompts_per_step": 32,
    "batch.samples_per_prompt": 4,
    "staleness.bound": 0,  # so that a step's rollouts are of one policy, that whose KL is measured
    "rollout.max_tokens": MAX_ANSWER_TOKENS,
    "rollout.gpus": 0,
    "rollout.start_timeout_s": 900,
    "algorithm.missing_eos_penalty": 0.0,
    "algorithm.kl.coef": 0.0,
    "learner.gpus": 0,
    "learner.lr": 4e-4,
    "learner.warmup_steps": 8,
    "learner.minibatches": 4,
}


@dataclass(frozen=True, slots=True)
class Work:
    """Where everything lies."""

    base: Path
    folder: Path
    scale: Scale

    @property
    def start(self) -> Path:
        return self.base / "policy"

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts.jsonl"

    @property
    def pool(self) -> Path:
        """Of this start, these prompts and this size: another one gets a file of its own."""
        made_from = _key(self.start, self.prompts)
        return self.folder / f"pool-{self.scale.pool}-{made_from}.parquet"

    def proxy(self, pairs: int) -> Path:
        return self.folder / f"proxy-{pairs}" / "reward_model"

    def ppo(self, pairs: int) -> Path:
        return self.folder / f"ppo-{pairs}"


def _key(*files: Path) -> str:
    """Of what the files and folders hold."""
    return "-".join(artefact_hash(path)[:8] for path in files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "overoptimisation")
    parser.add_argument("--base", type=Path, default=ROOT / "runs" / "methods" / "base")
    parser.add_argument("--methods", default="best-of-n,ppo")
    parser.add_argument("--steps", type=int, help="learner steps of each PPO run")
    parser.add_argument("--finished", action="store_true", help="train no PPO run that is missing")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--plot", type=Path, help="write the curves as SVG")
    parser.add_argument("--quick", action="store_true", help="a tiny task, in a folder of its own")
    given = parser.parse_args()
    scale = QUICK if given.quick else Scale()
    scale = replace(scale, steps=given.steps or scale.steps)
    folder = (given.work / "quick" if given.quick else given.work).absolute()
    base = folder / "base" if given.quick else given.base.absolute()
    import torch

    torch.set_num_threads(1)
    work = Work(ensure_base(base, scale.base), folder, scale)
    curves = run_all(work, given.methods.split(","), given.finished)
    print(table(curves))
    if given.out:
        content = {**provenance(), "settings": {"reward_model": REWARD_FIT, "ppo": PPO}}
        results = {**content, **results_of(curves)}
        given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if given.plot:
        write_plot(given.plot, curves)


def run_all(work: Work, methods: list[str], only_finished: bool) -> list[Curve]:
    make_prompts(work)
    for pairs, epochs in work.scale.pairs:
        train_proxy(work, pairs, epochs)
    make_pool(work)
    gold = pool_scores(work, GOLD)
    curves = []
    for pairs, _ in work.scale.pairs:
        proxy = pool_scores(work, f"proxy-{pairs}")
        if "best-of-n" in methods:
            curves.append(best_of_n_curve(pairs, proxy, gold))
        if "ppo" in methods and not (only_finished and not (work.ppo(pairs) / "policy").is_dir()):
            run = train_ppo(work, pairs)
            centre = (float(proxy.mean()), float(gold.mean()))
            curves.append(ppo_curve(pairs, ppo_scores(work, run), centre))
    return curves


def make_prompts(work: Work) -> None:
    lines = (work.base / "rl_prompts.jsonl").read_text(encoding="utf-8").splitlines(True)
    work.folder.mkdir(parents=True, exist_ok=True)
    work.prompts.write_text("".join(lines[: work.scale.prompts]), encoding="utf-8")


def train_proxy(work: Work, pairs: int, epochs: int) -> None:
    """`accord reward-model` on the first pairs of the base's file."""
    lines = (work.base / "pairs.jsonl").read_text(encoding="utf-8").splitlines(True)
    file = work.folder / f"pairs-{pairs}.jsonl"
    file.write_text("".join(lines[:pairs]), encoding="utf-8")
    run_once("reward-model", "examples/reward_model.toml", work.proxy(pairs).parent, {
        "model.path": work.start, "data.path": file, **REWARD_FIT, "fit.epochs": epochs,
    })  # fmt: skip


def make_pool(work: Work) -> None:
    """Completions of the start, by the engine on transformers: nothing else needs to be started."""
    if work.pool.is_file():
        return
    import pyarrow.parquet as pq

    from cluster.contracts.records import Rollout, RolloutGroup, Score
    from cluster.contracts.rollout_table import to_table

    source, size = prompts_of(work.base, "rl"), work.scale.pool
    prompts = [source.prompt(number) for number in range(work.scale.prompts)]
    sampler = Sampler(work.start, RUNNING)
    done = sampler.answers(prompts, size, "pool")
    none = Score(value=0.0, parts={}, scorer_version="", vetoes=())
    groups = []
    for number, prompt in enumerate(prompts):
        own = enumerate(done[number * size : (number + 1) * size])
        rollouts = [Rollout(prompt=prompt, completion=one, sample_index=i, text=sampler.text(one))
                    for i, one in own]  # fmt: skip
        samples = tuple((rollout, none) for rollout in rollouts)
        groups.append(RolloutGroup(group_id=number, samples=samples))
    pq.write_table(to_table(groups), work.pool)


def pool_scores(work: Work, judge: str) -> NDArray[np.float64]:
    """[prompts, completions of the pool] of the gold rule or of a proxy."""
    judges = () if judge == GOLD else (work.folder / judge / "reward_model",)
    file = work.folder / f"{judge}-{_key(work.pool, *judges)}.npy"
    if not file.is_file():
        import pyarrow.parquet as pq

        pool = rollouts_of(pq.read_table(work.pool))
        scores = gold_of(pool) if judge == GOLD else proxy_of(work, pool, judge)
        np.save(file, scores.reshape(work.scale.prompts, work.scale.pool))
    found: NDArray[np.float64] = np.load(file)
    return found


def rollouts_of(table: Any) -> list[Any]:
    """In the order of the groups and of the samples in them."""
    from cluster.contracts.rollout_table import from_table

    return [rollout for group in from_table(table) for rollout, _ in group.samples]


def gold_of(rollouts: list[Any]) -> NDArray[np.float64]:
    from cluster.quickstart.helpdesk.gold import gold

    columns: dict[str, list[Any]] = {
        name: [one.prompt.metadata[name] for one in rollouts]
        for name in ("kind", "product", "topic")
    }
    texts = [one.text for one in rollouts]
    return np.array(gold(prompts=[one.prompt for one in rollouts], completions=texts, **columns))


def proxy_of(work: Work, rollouts: list[Any], proxy: str) -> NDArray[np.float64]:
    from cluster.assembly.judging import scores_of
    from cluster.contracts.config.base import ModelConfig
    from cluster.contracts.config.reward import RewardConfig, RewardModelSource

    path = str(work.folder / proxy / "reward_model")
    reward = RewardConfig(sources=[RewardModelSource(path=path)])
    scores = scores_of(reward, [(ModelConfig(path=str(work.start)), rollouts)])[0]
    return np.array([score.value for score in scores])


def train_ppo(work: Work, pairs: int) -> Path:
    run, proxy = work.ppo(pairs), work.proxy(pairs)
    run_once("train", "examples/ppo_reward_model.toml", run, {
        "model.path": work.start, "data.prompts": work.prompts, "reward.sources.0.path": proxy,
        "learner.value_path": proxy, "batch.steps": work.scale.steps, **PPO,
    })  # fmt: skip
    return run


def ppo_scores(work: Work, run: Path) -> dict[str, NDArray[np.float64]]:
    """step, group, proxy, gold and kl of every completion that the run trained on: proxy is the
    reward that it trained for, gold is judged here."""
    file = run.with_name(f"{run.name}-{_key(run / 'rollouts')}.npz")
    if not file.is_file():
        import pyarrow.parquet as pq

        found: dict[str, list[Any]] = {"step": [], "group": [], "proxy": [], "gold": []}
        rollouts = []
        for path in sorted(run.glob("rollouts/step-*.parquet")):
            order = [("group_id", "ascending"), ("sample", "ascending")]
            table = pq.read_table(path).sort_by(order)
            found["step"] += [int(path.stem.partition("-")[2])] * len(table)
            found["group"] += table["group_id"].to_pylist()
            found["proxy"] += table["score"].to_pylist()
            rollouts += rollouts_of(table)
        found["gold"] = gold_of(rollouts).tolist()
        found["kl"] = kl_to_start(work, rollouts)
        np.savez(file, **{name: np.array(values) for name, values in found.items()})
    with np.load(file) as content:
        return dict(content)


def kl_to_start(work: Work, rollouts: list[Any]) -> list[float]:
    """Of each completion log pi - log start in nats, summed over its tokens (k1). pi: as the engine
    sampled it, whose policy the step then trained. The mean is the KL of that policy to the
    start."""
    import torch

    from cluster.contracts.config.base import ModelConfig
    from learner.compute.microbatches import token_row
    from learner.models.load import load_policy
    from learner.offline.completion_logps import all_completion_logps

    rows = []
    for one in rollouts:
        prompt, completion = one.prompt.token_ids, one.completion.token_ids
        trained = [False] * len(prompt) + [True] * len(completion)
        rows.append(token_row([*prompt, *completion], trained))
    start = load_policy(ModelConfig(path=str(work.start), dtype="float32"))
    theirs = all_completion_logps(start, rows, "float32", torch.device("cpu"), MICROBATCH_TOKENS)
    ours = [sum(one.completion.logprobs) for one in rollouts]
    return [a - b for a, b in zip(ours, theirs, strict=True)]


if __name__ == "__main__":
    main()
