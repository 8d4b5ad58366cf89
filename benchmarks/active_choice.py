"""Do chosen pairs teach a reward model more than random ones, at equal numbers of labels?

On the help-desk task of `accord quickstart`: its fine-tuned policy's completions, its simulated
annotators, and its gold judge. For each strategy and seed: 50 pairs are labelled, a reward model is
trained on all labels so far, it chooses among the pairs that were not asked, these are labelled,
and so on. The first batch is random. Half of the pairs are mismatched, as in the quickstart, and
these are random under every strategy. A tie costs a label and gives no pair, as with people. Every
reward model is an ensemble of four heads on one trunk, each on its own bootstrap of the pairs.

Without --whole the trunk is the fine-tuned policy's and stays as it is: the heads are Bradley-Terry
regressions on its states, so that many seeds take a minute. With --whole `accord reward-model`
trains trunk and heads.

    accord quickstart --scale 0.3 --name q
    python -m benchmarks.active_choice runs/q --out benchmarks/results/active_choice.json

Each strategy and seed adds its lines to FILE.rows.jsonl; started again, the benchmark goes on.
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
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.assembly.choosing import rewards_of
from cluster.contracts.chat import render_answered
from cluster.contracts.config.base import ModelConfig
from cluster.contracts.config.choice import ChoiceConfig
from cluster.contracts.config.offline import RewardModelConfig
from cluster.pages.labelling.items import read_groups
from cluster.quickstart.helpdesk.annotators import ANNOTATORS, label_pair
from cluster.quickstart.helpdesk.judge import gold_score
from learner.models.load import load_policy, load_tokenizer
from learner.offline.reward import train_reward_model
from reward_service.preferences.choice import (
    ChosenPair,
    CompletionGroup,
    Place,
    Scores,
    choose_pairs,
    item_id,
)

STRATEGIES = ("random", "uncertainty", "disagreement", "diversity")
COUNTS = (50, 100, 200, 400)
TEST_PROMPTS, POOL_PROMPTS = 80, 160
TEST_PAIRS = 300
MISMATCHED = 0.5
MEASURES = ("accuracy", "gold_accuracy", "gold_correlation")
MEMBERS = 4
RIDGE = 30.0  # of the regressions, on standardised states
T_95 = {3: 4.303, 4: 3.182, 5: 2.776, 10: 2.262, 20: 2.093}  # Student's t by number of seeds
FIT = {
    "lr": 7e-4, "epochs": 2, "rows_per_step": 16, "tokens_per_microbatch": 2048,
    "schedule": "linear", "max_tokens": 128, "eval_fraction": 0.0, "weight_decay": 0.01,
    "threads": 1,
}  # fmt: skip

Meta = Mapping[str, str]
Pair = tuple[int, Place, Place]
"""The group whose prompt it is, the better completion, the worse one."""


class Learner(Protocol):
    """Trains a reward model on pairs of the pool."""

    def train(self, pairs: Sequence[Pair], seed: int, name: str) -> None: ...

    def rewards(self, groups: Sequence[CompletionGroup]) -> list[Scores]:
        """[M, K] of each group's completions, by what was trained last."""
        ...


class Task:
    """Prompts to choose from, held-out pairs, and who judges them."""

    def __init__(self, run: Path) -> None:
        self.policy = str(run / "sft" / "policy")
        path = run / "round-1" / "completions" / "completions.jsonl"
        groups = read_groups(str(path))
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        known = {json.dumps(row["prompt"]): row["metadata"] for row in rows}
        meta = [known[json.dumps([dict(m) for m in group.messages])] for group in groups]
        self.pool = groups[TEST_PROMPTS : TEST_PROMPTS + POOL_PROMPTS]
        self.pool_meta = meta[TEST_PROMPTS : TEST_PROMPTS + POOL_PROMPTS]
        self._held_out(groups[:TEST_PROMPTS], meta[:TEST_PROMPTS])

    def _held_out(self, groups: Sequence[CompletionGroup], meta: Sequence[Meta]) -> None:
        """``held``: pairs of completions of held-out prompts, as groups of two. ``labels``: which
        of both an annotator prefers, None for neither; the same in all runs. ``gold``: [N, 2]."""
        config = ChoiceConfig(pairs_per_prompt=8, count=TEST_PAIRS, mismatched=MISMATCHED)
        self.held: list[CompletionGroup] = []
        self.labels: list[int | None] = []
        gold = []
        for number, pair in enumerate(choose_pairs(groups, config, seed=0)):
            own = pair.first[0]
            sides = tuple(groups[g].completions[c] for g, c in (pair.first, pair.second))
            order = label(groups, meta, pair, random.Random(f"test/{number}"))
            self.held.append(CompletionGroup(messages=groups[own].messages, completions=sides))
            self.labels.append(None if order is None else int(order[0] == pair.second))
            gold.append([gold_score(meta[own], side.text).score for side in sides])
        self.gold = np.array(gold)

    def measure(self, learner: Learner) -> dict[str, float]:
        """accuracy: on held-out labels, a tie of scores counts as wrong. gold_accuracy: on the
        held-out pairs that gold orders. gold_correlation: Pearson's, over held-out completions."""
        scores = np.array([own.mean(axis=1) for own in learner.rewards(self.held)])
        gaps, truth = scores[:, 1] - scores[:, 0], self.gold[:, 1] - self.gold[:, 0]
        right = [(gap > 0) == bool(said) for gap, said in zip(gaps, self.labels, strict=True)
                 if said is not None]  # fmt: skip
        ordered = np.abs(truth) > 0.01
        return {
            "accuracy": statistics.fmean(right),
            "gold_accuracy": float(np.mean((gaps * truth)[ordered] > 0)),
            "gold_correlation": float(np.corrcoef(scores.ravel(), self.gold.ravel())[0, 1]),
        }


def label(
    groups: Sequence[CompletionGroup], meta: Sequence[Meta], pair: ChosenPair, rng: random.Random
) -> tuple[Place, Place] | None:
    """(better, worse) by one of the annotators; None for a tie and for "both bad"."""
    texts = [groups[g].completions[c].text for g, c in (pair.first, pair.second)]
    annotator = rng.choice(ANNOTATORS)
    choice = label_pair(annotator, meta[pair.first[0]], texts[0], texts[1], rng).choice
    if choice == "a":
        return pair.first, pair.second
    return (pair.second, pair.first) if choice == "b" else None


def one_run(task: Task, learner: Learner, strategy: str, seed: int) -> list[dict[str, Any]]:
    """A record for each number of labels. The first batch is the same for all strategies."""
    asked: set[str] = set()
    pairs: list[Pair] = []
    found: list[dict[str, Any]] = []
    for before, count in zip((0, *COUNTS[:-1]), COUNTS, strict=True):
        config = ChoiceConfig.model_validate(
            {
                "strategy": strategy if before else "random",
                "count": count - before,
                "pairs_per_prompt": 4,
                "mismatched": MISMATCHED,
            }
        )
        scores = learner.rewards(task.pool) if config.needs_scores else None
        for pair in choose_pairs(task.pool, config, seed * 1000 + before, scores, asked):
            name = item_id(task.pool, pair)
            asked.add(name)
            order = label(task.pool, task.pool_meta, pair, random.Random(f"{seed}/{name}"))
            if order is not None:
                pairs.append((pair.first[0], *order))
        learner.train(pairs, seed, f"{strategy if before else 'first'}-{seed}-{count}")
        figures = {"asked": len(asked), "pairs": len(pairs), **task.measure(learner)}
        found.append({"strategy": strategy, "seed": seed, "labels": count, **figures})
    return found


# -- two ways to train -----------------------------------------------------------------------------


class Heads:
    """Bradley-Terry regressions on the states of the fine-tuned policy: its last one, and the mean
    over the completion."""

    def __init__(self, task: Task) -> None:
        config = ModelConfig(path=task.policy)
        self._model, self._tokenizer = load_policy(config), load_tokenizer(config)
        self._pool = task.pool
        self._known: dict[tuple[str, str], NDArray[np.float64]] = {}
        states = np.concatenate([self._states(group) for group in task.pool])
        self._mean, self._scale = states.mean(axis=0), states.std(axis=0) + 1e-6
        self._weights = np.zeros((states.shape[1], MEMBERS))

    def _states(self, group: CompletionGroup) -> NDArray[np.float64]:
        return np.array([self._state(group, one.text) for one in group.completions])

    def _state(self, group: CompletionGroup, text: str) -> NDArray[np.float64]:
        key = (json.dumps([dict(m) for m in group.messages]), text)
        if key not in self._known:
            prompt, answer = render_answered(self._tokenizer, group.messages, text)
            with torch.inference_mode():
                ids = torch.tensor([[*prompt, *answer]])
                states = self._model.model(ids).last_hidden_state[0]
                both = torch.cat([states[-1], states[len(prompt) :].mean(dim=0)])
            self._known[key] = both.double().numpy()
        return self._known[key]

    def train(self, pairs: Sequence[Pair], seed: int, name: str) -> None:
        groups = self._pool
        sides = [
            [self._state(groups[own], groups[g].completions[c].text) for g, c in order]
            for own, *order in pairs
        ]
        differences = np.array([better - worse for better, worse in sides]) / self._scale
        drawn = np.random.default_rng(seed).poisson(1.0, size=(MEMBERS, len(pairs)))
        self._weights = np.stack([_regression(differences, own) for own in drawn], axis=1)

    def rewards(self, groups: Sequence[CompletionGroup]) -> list[Scores]:
        states = ((self._states(group) - self._mean) / self._scale for group in groups)
        return [own @ self._weights for own in states]


def _regression(differences: NDArray[np.float64], drawn: NDArray[Any]) -> NDArray[np.float64]:
    """Newton's method on -sum drawn log sigmoid(differences w) + RIDGE/2 |w|^2."""
    weights = np.zeros(differences.shape[1])
    for _ in range(12):
        wrong = 1 / (1 + np.exp(differences @ weights))
        gradient = RIDGE * weights - differences.T @ (drawn * wrong)
        curvature = differences.T @ (differences * (drawn * wrong * (1 - wrong))[:, None])
        curvature += RIDGE * np.eye(len(weights))
        weights = weights - np.linalg.solve(curvature, gradient)
    return weights


class WholeModels:
    """`accord reward-model`, from the fine-tuned policy. What is trained is kept in ``folder``."""

    def __init__(self, task: Task, folder: Path) -> None:
        self._task, self._folder, self._model = task, folder, ""

    def train(self, pairs: Sequence[Pair], seed: int, name: str) -> None:
        folder = self._folder / name
        self._model = str(folder / "run" / "reward_model")
        if (folder / "run" / "figures.json").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        data = folder / "pairs.jsonl"
        rows = (json.dumps(_row(self._task.pool, pair)) for pair in pairs)
        data.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        config = RewardModelConfig.model_validate(
            {
                "run": {"seed": seed},
                "model": {"path": self._task.policy, "dtype": "float32"},
                "data": {"path": str(data)},
                "members": MEMBERS,
                "fit": FIT,
            }
        )
        train_reward_model(config, folder / "run")
        shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)

    def rewards(self, groups: Sequence[CompletionGroup]) -> list[Scores]:
        return rewards_of(groups, self._model)


def _row(groups: Sequence[CompletionGroup], pair: Pair) -> dict[str, Any]:
    own, *order = pair
    chosen, rejected = (
        [{"role": "assistant", "content": groups[g].completions[c].text}] for g, c in order
    )
    messages = [dict(message) for message in groups[own].messages]
    return {"prompt": messages, "chosen": chosen, "rejected": rejected}


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
            for key in MEASURES
        }
        found[name]["pairs_of_labels"] = statistics.fmean(
            r["pairs"] / r["asked"]
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
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("run", type=Path, help="a run of `accord quickstart`")
    parser.add_argument("--out", type=Path, default=Path("active_choice.json"))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--whole", action="store_true", help="train whole models")
    given = parser.parse_args()
    task = Task(given.run)
    kept = given.out.with_suffix(".rows.jsonl")
    lines = kept.read_text("utf-8").splitlines() if kept.exists() else []
    records = [json.loads(line) for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        learner = WholeModels(task, Path(folder)) if given.whole else Heads(task)
        for seed in range(given.seeds):
            for strategy in STRATEGIES:
                if any((r["strategy"], r["seed"]) == (strategy, seed) for r in records):
                    continue
                records += one_run(task, learner, strategy, seed)
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
                print(json.dumps(records[-1]), flush=True)
    found = {
        "task": {
            "prompts": len(task.pool), "held_out_prompts": TEST_PROMPTS,
            "held_out_pairs": len(task.held), "mismatched": MISMATCHED, "seeds": given.seeds,
            "members": MEMBERS, **({"fit": FIT} if given.whole else {"ridge": RIDGE}),
        },
        "strategies": summary(records),
    }  # fmt: skip
    given.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
