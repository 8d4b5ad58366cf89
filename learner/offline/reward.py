"""`accord reward-model`: one reward model, or an ensemble, on the policy's own trunk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from cluster.contracts.config.offline import RewardModelConfig
from cluster.contracts.errors import UserError
from cluster.contracts.metrics import Metric
from learner.compute.microbatches import TokenRow
from learner.compute.ranks import SINGLE, Ranks, whole
from learner.compute.sharding import bare, local, split_like
from learner.models.heads import LmHead, lm_head
from learner.models.load import (
    load_sequence_classifier,
    load_tokenizer,
    stop_token_ids,
)
from learner.models.placement import Placement
from learner.offline.datasets import read_demonstrations, read_rankings
from learner.offline.fit import FitResult, OnStep, fit, never
from learner.offline.reward_figures import drift, held_out_figures
from learner.offline.reward_rows import RewardRow, bootstrap, encode
from learner.offline.reward_saving import (
    gather_members,
    reward_padding_id,
    save_reward_model,
    spread_of,
)
from learner.offline.reward_task import RewardTask, Scores, pair_metrics
from learner.offline.setup import (
    OnRows,
    TrainingRows,
    encode_all,
    load_rows,
    made_ready,
    place_of,
    policy_at,
    prepare,
    unheard,
    write_summary,
)
from learner.offline.sft import encode as encode_demonstration

GOLDEN_ROWS = 4
MOST_CENTRED = 2048
"""Completions scored to set centre and scale, and to measure drift: enough to know a mean to a
fortieth of the spread, and a small part of what training costs."""
FIGURES = "figures.json"


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Member:
    """A trained model: its directory, and its scores less their mean on the centring rows.

    held: [M, K] of each held-out row's completions. training, samples: [N, K].
    """

    folder: Path
    held: list[Scores]
    training: Scores
    samples: Scores | None


def train_reward_model(
    config: RewardModelConfig,
    run_dir: Path,
    progress: OnStep | None = None,
    should_stop: Callable[[], bool] = never,
    on_rows: OnRows = unheard,
    ranks: Ranks = SINGLE,
    rows: RewardData | None = None,
) -> Path:
    """Train on pairs, ties and rankings; returns run_dir/reward_model, for
    `models.load.load_reward_members`.

    Reports train/{loss,accuracy,margin,...} and, on held-out rows, rm/{loss,accuracy,margin,ece};
    of an ensemble of whole models the last evaluation is that of the ensemble. run_dir/figures.json
    gets what `reward_figures` measures. Continues and takes `rows` as `train_sft` does; stopped
    early, it leaves its checkpoint and returns that folder.
    """
    device = prepare(config.fit, config.run.seed)
    tokenizer = load_tokenizer(config.model)
    read = rows or read_rows(config)
    data, samples = read.rows, read.samples
    on_rows(data)
    place = place_of(config, ranks, device)
    run_dir.mkdir(parents=True, exist_ok=True)
    count = 1 if config.share_trunk else config.members
    members: list[Member] = []
    for number in range(count):
        own = replace(place, seed=config.run.seed + number)
        training = _Training(config, run_dir, tokenizer, data, samples, own, number)
        tell = None if progress is None else partial(_told, progress, number, count)
        member, result = training.run(tell, should_stop)
        if member is None:  # half a model, whose centring would take long: only its checkpoint
            write_summary(run_dir, result, data, ranks)
            return run_dir / "checkpoints"
        members.append(member)
    if ranks.first:
        _finish(run_dir, data, members, result)
    ranks.barrier()
    return run_dir / "reward_model"


@dataclass(frozen=True, slots=True)
class RewardData:
    """Rows to learn from; completions of the policy that the reward is for, where there are any."""

    rows: TrainingRows[RewardRow]
    samples: list[TokenRow] | None


def read_rows(config: RewardModelConfig) -> RewardData:
    """The preferences of a config, split and with token ids, and the policy's completions."""
    skip_bad, tokenizer = config.data.skip_bad_rows, load_tokenizer(config.model)
    read = read_rankings(
        config.data.path,
        config.data.split,
        skip_bad,
        rankings=config.ranking_loss == "plackett-luce",
        ties=config.tie_threshold > 0,
    )
    encode_row = partial(encode, config=config)
    rows = load_rows(read, tokenizer, encode_row, lambda row: row.longest, config.fit, skip_bad)
    return RewardData(rows, _policy_samples(config, tokenizer))


def _told(
    progress: OnStep, number: int, count: int, step: int, fraction: float, numbers: Any
) -> None:
    """A member's progress as part of the whole ensemble's. Members make about as many steps."""
    steps = round(step / fraction) if fraction else 0
    progress(number * steps + step, (number + fraction) / count, numbers)


@dataclass(frozen=True, slots=True)
class _Training:
    """The training of one model; `number` of an ensemble of whole ones."""

    config: RewardModelConfig
    run_dir: Path
    tokenizer: Any
    data: TrainingRows[RewardRow]
    samples: list[TokenRow] | None
    place: Placement
    number: int

    @property
    def directory(self) -> Path:
        whole = self.config.share_trunk or self.config.members == 1
        return self.run_dir / ("reward_model" if whole else f"members/{self.number}")

    def run(
        self, progress: OnStep | None, should_stop: Callable[[], bool]
    ) -> tuple[Member | None, FitResult]:
        """The member, None when stopped early."""
        config, seed = self.config, self.config.run.seed + self.number
        torch.manual_seed(seed)
        head = _frozen_head(config, self.place)
        model = self._fresh(seed)
        task = RewardTask(model, config, self.place.device, head, self.place.mesh)
        checkpoints = self.run_dir / "checkpoints"
        result = fit(
            model,
            bootstrap(self.data.train, config.members if config.share_trunk else 1, seed),
            task.loss,
            config.fit,
            seed=seed,
            evaluate=(lambda: task.evaluate(self.data.held)) if self.data.held else None,
            on_step=progress,
            should_stop=should_stop,
            checkpoint=checkpoints / str(self.number) if self.number else checkpoints,
            mesh=self.place.mesh,
        )
        return (self._member(task) if result.finished else None), result

    def _fresh(self, seed: int) -> Any:
        """The model to be trained, or the root of one in parts."""
        model, tokenizer = self.config.model, self.tokenizer
        pad = reward_padding_id(tokenizer, stop_token_ids(model.path, tokenizer, model.revision))
        heads = self.config.members if self.config.share_trunk else 1
        if self.place.in_parts:
            fresh = self.place.load_classifier(model, pad_token_id=pad, heads=heads)
        else:
            fresh = load_sequence_classifier(model, pad_token_id=pad, heads=heads)
            fresh = made_ready(self.place, fresh)
        _start(bare(fresh).score.weight, seed)
        return fresh

    def _member(self, task: RewardTask) -> Member:
        sides = sum(len(row.ranked) for row in self.data.train)
        rows = spread_over(self.data.train, len(self.data.train) * MOST_CENTRED // sides)
        training = task.score_all([side for row in rows for side in row.ranked])
        held, samples = task.score_rows(self.data.held), None
        if self.samples is not None:
            samples = task.score_all(self.samples)
        centre = training if samples is None else samples
        centred_on = "training rows" if samples is None else "completions of the policy"
        few = (self.data.held or self.data.train)[:GOLDEN_ROWS]
        golden = [side for row in few for side in row.ranked][:GOLDEN_ROWS]
        means, scale = centre.mean(axis=0), spread_of(centre)
        folder = save_reward_model(task, self.tokenizer, centre, centred_on, golden, self.directory)
        # Whole models are each on a scale of their own; heads on one trunk share theirs.
        shared = 1.0 if self.config.share_trunk else scale
        return Member(
            folder,
            [(scores - means) / shared for scores in held],
            (training - means) / shared,
            None if samples is None else (samples - means) / shared,
        )


def spread_over(rows: Sequence[T], most: int) -> Sequence[T]:
    """All rows, or `most` of them (at least one), evenly spaced."""
    if len(rows) <= most:
        return rows
    most = max(1, most)
    return [rows[number * len(rows) // most] for number in range(most)]


def _finish(
    run_dir: Path, data: TrainingRows[RewardRow], members: Sequence[Member], result: FitResult
) -> None:
    """The summary, the figures and the directory of the whole ensemble."""
    held = [np.hstack(parts) for parts in zip(*(member.held for member in members), strict=True)]
    if len(members) > 1 and held:
        numbers = pair_metrics(data.held, [scores.mean(axis=1) for scores in held])
        result = replace(result, numbers={**result.numbers, **_values(numbers)})
    write_summary(run_dir, result, data)
    figures = held_out_figures(data.held, held)
    samples = [member.samples for member in members if member.samples is not None]
    if samples:
        training = np.hstack([member.training for member in members])
        figures["drift"] = dict(drift(training, np.hstack(samples)))
    partial_file = run_dir / f".{FIGURES}.part"
    partial_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    partial_file.replace(run_dir / FIGURES)
    if len(members) > 1:
        gather_members([member.folder for member in members], run_dir / "reward_model")
        shutil.rmtree(run_dir / "members")


def _values(metrics: Sequence[Metric]) -> dict[str, float]:
    return {metric.name: metric.value for metric in metrics}


@torch.no_grad()
def _start(head: Tensor, seed: int) -> None:
    """Small and random numbers, the same however the head [K, H] is sharded: from zeros, the trunk
    would get no gradient until the head has grown."""
    full = torch.empty(head.shape)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(full, std=(head.shape[1] + 1) ** -0.5, generator=generator)
    local(head).copy_(local(split_like(full, head)))


def _frozen_head(config: RewardModelConfig, place: Placement) -> LmHead | None:
    """The starting policy's language-model head. It does not change, so only the trunk learns."""
    if not config.nll_coef:
        return None
    head = lm_head(bare(policy_at(place, config.model, frozen=True)))
    bias = None if head.bias is None else whole(head.bias.detach())
    return replace(head, weight=whole(head.weight.detach()).clone(), bias=bias)


def _policy_samples(config: RewardModelConfig, tokenizer: Any) -> list[TokenRow] | None:
    if config.policy_samples is None:
        return None
    read = spread_over(read_demonstrations(config.policy_samples).items, MOST_CENTRED)
    rows = encode_all(read, tokenizer, encode_demonstration, len, config.fit.max_tokens).rows
    if len(rows) < 2:
        raise UserError(
            f"{len(rows)} usable rows cannot centre a reward model",
            where=config.policy_samples,
            fix="give at least two prompts with completions within fit.max_tokens (some hundreds "
            "are good)",
        )
    return rows
