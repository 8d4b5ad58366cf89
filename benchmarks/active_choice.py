"""Do chosen pairs teach a reward model more than random ones, at equal numbers of labels?

On the help-desk task of `accord quickstart`: its fine-tuned policy's completions, its simulated
annotators, and its gold judge. For each strategy and seed: 50 random pairs are labelled, a reward
model is trained, it chooses among the pairs that were not asked, these are labelled, and so on. A
tie costs a label and gives no pair, as with people. Every reward model is an ensemble of four heads
on one trunk, trained anew from the fine-tuned policy on all labels so far.

    accord quickstart --scale 0.3 --name q
    python -m benchmarks.active_choice runs/q --out benchmarks/results/active_choice.json

Each trained reward model becomes a line of FILE.rows.jsonl; started again, the benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.assembly.choosing import rewards_of
from cluster.contracts.config.choice import ChoiceConfig
from cluster.contracts.config.offline import RewardModelConfig
from cluster.pages.labelling.items import read_groups
from cluster.quickstart.helpdesk.annotators import ANNOTATORS, label_pair
from cluster.quickstart.helpdesk.judge import gold_score
from learner.offline.reward import train_reward_model
from reward_service.preferences.choice import ChosenPair, CompletionGroup, choose_pairs, item_id

STRATEGIES = ("random", "uncertainty", "disagreement", "diversity")
COUNTS = (50, 100, 200, 400)
TEST_PROMPTS = 80
TEST_PAIRS = 600
T_95 = {3: 4.303, 4: 3.182, 5: 2.776}  # Student's t by number of seeds
FIT = {
    "lr": 5e-4, "epochs": 3, "rows_per_step": 16, "tokens_per_microbatch": 2048,
    "schedule": "linear", "max_tokens": 128, "eval_fraction": 0.0, "weight_decay": 0.01,
    "threads": 1,
}  # fmt: skip

Meta = Mapping[str, str]


class Task:
    """Prompts to choose from, held-out prompts, and who judges them."""

    def __init__(self, run: Path) -> None:
        self.policy = str(run / "sft" / "policy")
        path = run / "data" / "sft_answers.jsonl"
        groups = read_groups(str(path))
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        known = {json.dumps(row["prompt"]): row["metadata"] for row in rows}
        meta = [known[json.dumps([dict(m) for m in group.messages])] for group in groups]
        self.test, self.pool = groups[:TEST_PROMPTS], groups[TEST_PROMPTS:]
        self.test_meta, self.pool_meta = meta[:TEST_PROMPTS], meta[TEST_PROMPTS:]
        self.held = self._held_out()
        self.gold = [
            np.array([gold_score(m, c.text).score for c in group.completions])
            for group, m in zip(self.test, self.test_meta, strict=True)
        ]

    def _held_out(self) -> list[tuple[int, int, int]]:
        """(group, better, worse) of random held-out pairs, labelled once for all runs."""
        config = ChoiceConfig(pairs_per_prompt=15, count=TEST_PAIRS)
        found = []
        for pair in choose_pairs(self.test, config, seed=0):
            order = label(self.test, self.test_meta, pair, random.Random(f"test/{pair}"))
            if order is not None:
                found.append((pair.first[0], order[0][1], order[1][1]))
        return found

    def measure(self, reward_model: str) -> dict[str, float]:
        """accuracy: on held-out labels. gold_accuracy: on all held-out pairs that gold orders.
        gold_correlation: Pearson's, over held-out completions, less their prompt's mean."""
        scores = [own.mean(axis=1) for own in rewards_of(self.test, reward_model)]
        right = [scores[g][better] > scores[g][worse] for g, better, worse in self.held]
        by_gold = [
            (own[i] - own[j]) * (gold[i] - gold[j]) > 0
            for own, gold in zip(scores, self.gold, strict=True)
            for i in range(len(own))
            for j in range(i)
            if abs(gold[i] - gold[j]) > 0.01
        ]
        within = [
            np.concatenate([own - own.mean() for own in side]) for side in (scores, self.gold)
        ]
        return {
            "accuracy": statistics.fmean(right),
            "gold_accuracy": statistics.fmean(by_gold),
            "gold_correlation": float(np.corrcoef(within[0], within[1])[0, 1]),
        }


def label(
    groups: Sequence[CompletionGroup], meta: Sequence[Meta], pair: ChosenPair, rng: random.Random
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """(better, worse) by one of the annotators; None for a tie and for "both bad"."""
    texts = [groups[g].completions[c].text for g, c in (pair.first, pair.second)]
    choice = label_pair(rng.choice(ANNOTATORS), meta[pair.first[0]], texts[0], texts[1], rng).choice
    if choice == "a":
        return pair.first, pair.second
    return (pair.second, pair.first) if choice == "b" else None


def one_run(
    task: Task, strategy: str, seed: int, folder: Path, done: dict[tuple[str, int, int], Any]
) -> list[dict[str, Any]]:
    """Of one strategy and seed, a record for each number of labels that is not in ``done``."""
    rows: list[dict[str, Any]] = []
    asked: set[str] = set()
    pairs: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    model: str | None = None
    for before, count in zip((0, *COUNTS), COUNTS, strict=False):
        how = strategy if before else "random"  # the first batch is the same for all strategies
        config = ChoiceConfig.model_validate(
            {"strategy": how, "count": count - before, "pairs_per_prompt": 2}
        )
        scores = None
        if config.needs_scores:
            assert model is not None
            scores = rewards_of(task.pool, model)
        chosen = choose_pairs(task.pool, config, seed * 1000 + before, scores, asked)
        for pair in chosen:
            asked.add(item_id(task.pool, pair))
            rng = random.Random(f"label/{seed}/{item_id(task.pool, pair)}")
            order = label(task.pool, task.pool_meta, pair, rng)
            if order is not None:
                pairs.append(_row(task.pool, order))
        rows.append({"labels": len(asked), "pairs": len(pairs)})
        model = _train(task, pairs, seed, folder / f"{strategy}-{seed}-{count}")
        key = (strategy, seed, count)
        record = done.get(key) or {
            "strategy": strategy, "seed": seed, **rows[-1], **task.measure(model),
        }  # fmt: skip
        found.append(record)
    return found


def _row(groups: Sequence[CompletionGroup], order: Any) -> dict[str, Any]:
    (g, better), (_, worse) = order
    texts = [groups[g].completions[c].text for c in (better, worse)]
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in texts)
    prompt = [dict(message) for message in groups[g].messages]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _train(task: Task, pairs: Sequence[dict[str, Any]], seed: int, folder: Path) -> str:
    folder.mkdir(parents=True)
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    config = RewardModelConfig.model_validate(
        {
            "run": {"seed": seed},
            "model": {"path": task.policy, "dtype": "float32"},
            "data": {"path": str(data)},
            "members": 4,
            "fit": FIT,
        }
    )
    path = train_reward_model(config, folder / "run")
    shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
    return str(path)


# -- the table -------------------------------------------------------------------------------------


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each strategy and number of labels mean and 95 % interval over seeds (Student's t); the
    paired difference to random; the labels for which the mean accuracy is that of random at the
    most labels."""
    found: dict[str, Any] = {}
    names = [name for name in STRATEGIES if any(r["strategy"] == name for r in records)]
    for name in names:
        found[name] = {
            key: {
                str(count): {
                    **_interval(_values(records, name, count, key)),
                    "against_random": _interval(
                        [
                            own - other
                            for own, other in zip(
                                _values(records, name, count, key),
                                _values(records, "random", count, key),
                                strict=True,
                            )
                        ]
                    ),
                }
                for count in COUNTS
            }
            for key in ("accuracy", "gold_accuracy", "gold_correlation")
        }
        found[name]["pairs_of_labels"] = statistics.fmean(
            r["pairs"] / r["labels"]
            for r in records
            if r["strategy"] == name and r["labels"] == COUNTS[-1]
        )
    for key in ("accuracy", "gold_accuracy"):
        goal = found["random"][key][str(COUNTS[-1])]["mean"]
        for name in names:
            means = [found[name][key][str(count)]["mean"] for count in COUNTS]
            found[name][f"labels_for_{key}_of_random"] = _labels_for(goal, means)
    return found


def _values(
    records: Sequence[Mapping[str, Any]], strategy: str, count: int, key: str
) -> list[float]:
    own = [r for r in records if r["strategy"] == strategy and r["labels"] == count]
    return [float(r[key]) for r in sorted(own, key=lambda r: int(r["seed"]))]


def _interval(values: Sequence[float]) -> dict[str, float]:
    mean = statistics.fmean(values)
    if len(values) not in T_95:
        return {"mean": mean}
    half = T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _labels_for(goal: float, means: Sequence[float]) -> float | None:
    """Between the numbers of labels the means are joined by lines. None: it is not reached."""
    if means[0] >= goal:
        return float(COUNTS[0])
    for number in range(1, len(COUNTS)):
        low, high = means[number - 1], means[number]
        if low < goal <= high:
            share = (goal - low) / (high - low)
            return COUNTS[number - 1] + share * (COUNTS[number] - COUNTS[number - 1])
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run of `accord quickstart`")
    parser.add_argument("--out", type=Path, default=Path("active_choice.json"))
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    task = Task(given.run)
    kept = given.out.with_suffix(".rows.jsonl")
    lines = kept.read_text("utf-8").splitlines() if kept.exists() else []
    records = [json.loads(line) for line in lines]
    there = {(r["strategy"], r["seed"]) for r in records if r["labels"] == COUNTS[-1]}
    records = [r for r in records if (r["strategy"], r["seed"]) in there]
    for seed in range(given.seeds):
        for strategy in STRATEGIES:
            if (strategy, seed) in there:
                continue
            with tempfile.TemporaryDirectory() as folder:
                new = one_run(task, strategy, seed, Path(folder), {})
            records += new
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
            print(json.dumps(new[-1]), flush=True)
    found = {
        "task": {
            "prompts": len(task.pool), "held_out_prompts": len(task.test),
            "held_out_pairs": len(task.held), "seeds": given.seeds, "fit": FIT, "members": 4,
        },
        "strategies": summary(records),
    }  # fmt: skip
    given.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
