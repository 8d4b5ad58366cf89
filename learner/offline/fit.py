"""The one loop of supervised fine-tuning, reward model and DPO.

A row knows how many padded tokens it costs (`len`) and what it counts in the loss's denominator
(`weight`: trained tokens, or 1 for a pair). The order of rows is a function of seed and epoch, so
the number of steps done is the whole position, and a resumed run continues bit for bit.

Several processes ("ranks") read the same rows and run a share of each step's microbatches. Losses
carry the denominator of the whole step, so the sums over ranks are the numbers of one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from cluster.contracts.config.offline import FitConfig
from cluster.contracts.errors import Fatal, UserError
from cluster.contracts.metrics import Metric, last, mean, merge
from learner.compute.mesh import ALONE, Mesh
from learner.compute.optimizer import lr_factor, make_optimizer, set_lr
from learner.compute.optimizer_step import SkipCounter, optimiser_step
from learner.compute.ranks import Ranks
from learner.compute.sharding import bare
from learner.models.lora import adapter_dropout
from learner.offline.checkpoint import FitCheckpoints, FitState, fingerprint
from learner.offline.shares import shares


class FitRow(Protocol):
    def __len__(self) -> int:
        """Padded tokens of a forward pass over this row."""
        ...

    @property
    def weight(self) -> float:
        """Its share of the loss's denominator."""
        ...


R = TypeVar("R", bound=FitRow)

LossFn = Callable[[Sequence[R], float], tuple[Tensor, list[Metric]]]
"""(rows of a microbatch, global denominator) -> (loss that adds up over microbatches, metrics)."""

OnStep = Callable[[int, float, Mapping[str, float]], None]
"""(steps done, fraction of the whole done, numbers by metric name)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """finished: False when `should_stop` ended it. numbers: the last evaluation."""

    steps: int
    finished: bool
    skipped_steps: int
    seconds: float
    numbers: Mapping[str, float]


def never() -> bool:
    return False


def fit(
    model: nn.Module,
    rows: Sequence[R],
    loss_fn: LossFn[R],
    config: FitConfig,
    *,
    seed: int = 0,
    before_step: Callable[[Sequence[R]], None] | None = None,
    evaluate: Callable[[], list[Metric]] | None = None,
    on_step: OnStep | None = None,
    should_stop: Callable[[], bool] = never,
    checkpoint: Path | None = None,
    mesh: Mesh = ALONE,
) -> FitResult:
    """Train `model` in place until epochs, max_steps or max_seconds are over, whichever is first.

    model: may be `Gathered`.
    before_step: gets all rows of a step, before they are cut into microbatches.
    evaluate: called every `eval_every` steps and when all is done; its metrics go to `on_step` too.
    should_stop: asked before every step; True saves a checkpoint and returns with finished False.
    checkpoint: folder of checkpoints; the newest one there is continued. None: none are kept.
    mesh: of the processes that train together. Each calls this with the same arguments, but
    `should_stop` and the clock of the first one decide for all.
    Raises UserError for no rows or a checkpoint of another run, Fatal for three steps that are not
    finite.
    """
    loop = _Loop(model, rows, loss_fn, config, seed, checkpoint, before_step, mesh)
    numbers: Mapping[str, float] = {}
    evaluated_at, finished = -1, True
    while True:
        stop = loop.agree(should_stop)
        if loop.over():
            break
        if stop:
            loop.save()
            finished = False
            break
        metrics = loop.step()
        if evaluate is not None and loop.state.step % config.eval_every == 0:
            numbers, evaluated_at = _numbers(evaluate()), loop.state.step
            metrics |= numbers
        if on_step is not None:
            on_step(loop.state.step, loop.fraction(), metrics)
        if loop.state.step % config.checkpoint_every == 0:
            loop.save()
    # Somebody who stops it waits for it to end: no long evaluation then.
    if finished and evaluate is not None and evaluated_at != loop.state.step:
        numbers = _numbers(evaluate())
        if on_step is not None:
            on_step(loop.state.step, loop.fraction(), numbers)
    return FitResult(
        steps=loop.state.step,
        finished=finished,
        skipped_steps=loop.skips.total,
        seconds=loop.elapsed(),
        numbers=numbers,
    )


class _Loop:
    """What changes from step to step."""

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[Any],
        loss_fn: LossFn[Any],
        config: FitConfig,
        seed: int,
        checkpoint: Path | None,
        before_step: Callable[[Sequence[Any]], None] | None,
        mesh: Mesh,
    ) -> None:
        if not rows:
            raise UserError(
                "no rows are left to train on",
                where="data",
                fix="give more rows, raise fit.max_tokens or lower fit.eval_fraction",
            )
        self.root, self.model = model, bare(model)
        self.rows, self.loss_fn = rows, loss_fn
        self.config, self.seed, self.before_step = config, seed, before_step
        self.mesh = mesh
        # Not that of the parameters, which may lie in the memory of the host.
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.optimizer = make_optimizer(
            self.model.parameters(),
            config.lr,
            config.betas,
            config.eps,
            config.weight_decay,
            eight_bits=config.optimizer == "adamw8bit",
            on_host="optimizer" in config.offload,
        )
        self.steps_per_epoch = -(-len(rows) // config.rows_per_step)
        total = config.epochs * self.steps_per_epoch
        self.total = min(total, config.max_steps or total)
        self.skips = SkipCounter()
        self.state = FitState(step=0, seconds=0.0, skipped=0)
        self.store: FitCheckpoints | None = None
        if checkpoint is not None:
            costs = [(len(row), row.weight) for row in rows]
            run = fingerprint(config, seed, costs)
            _check_same(run, mesh.everyone)
            self.store = FitCheckpoints(checkpoint, run, mesh.everyone)
            self.state = self.store.restore(self.model, self.optimizer) or self.state
            self.skips.total = self.state.skipped
        self.started = time.monotonic() - self.state.seconds
        self.seconds = self.state.seconds  # trained when the ranks last agreed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def agree(self, should_stop: Callable[[], bool]) -> bool:
        """Take the first rank's time as everybody's; whether that rank is to stop."""
        own = torch.zeros(2, dtype=torch.float64, device=self.device)
        if self.mesh.first:
            self.seconds = self.elapsed()
            own[0], own[1] = self.seconds, should_stop()
        self.mesh.everyone.sum_([own])
        self.seconds, stop = own.tolist()
        return bool(stop)

    def fraction(self) -> float:
        """Part of the whole that is done: by steps or by time, whichever is further."""
        by_time = self.seconds / self.config.max_seconds if self.config.max_seconds else 0.0
        return min(1.0, max(self.state.step / self.total, by_time))

    def over(self) -> bool:
        return self.fraction() >= 1.0

    def save(self) -> None:
        if self.store is not None:
            self.state.seconds, self.state.skipped = self.elapsed(), self.skips.total
            self.store.save(self.model, self.optimizer, self.state)

    def step(self) -> dict[str, float]:
        begun, config = time.monotonic(), self.config
        rows = self._next_rows()
        if self.before_step is not None:
            self.before_step(rows)
        denominator = float(sum(row.weight for row in rows))
        share = shares([len(row) for row in rows], config.tokens_per_microbatch, self.mesh.data)
        calls = [
            partial(self._microbatch, [rows[i] for i in part], denominator, counts)
            for part, counts in share
        ]
        lr = set_lr(self.optimizer, self._lr_factor())
        with adapter_dropout(self.model):
            outcome = optimiser_step(
                self.optimizer,
                self.model.parameters(),
                calls,
                config.max_grad_norm,
                self.skips,
                self.mesh,
                (self.root,) if config.gradient_reduction == "step" else (),
            )
        metrics = self.mesh.data.gather_metrics(outcome.metrics)
        self.state.step += 1
        seconds = time.monotonic() - begun
        tokens = sum(len(row) for row in rows)
        return _numbers(
            [
                *metrics,
                last("train/grad_norm", outcome.grad_norm),
                last("train/lr", lr),
                last("train/epoch", self.state.step / self.steps_per_epoch),
                last("train/skipped_steps", self.skips.total),
                last("time/step", seconds),
                mean("perf/tokens_per_s", tokens, seconds),
            ]
        )

    def _microbatch(
        self, rows: Sequence[Any], denominator: float, counts: bool
    ) -> tuple[Tensor, list[Metric]]:
        loss, metrics = self.loss_fn(rows, denominator)
        return (loss, metrics) if counts else (loss * 0.0, [])

    def _lr_factor(self) -> float:
        schedule, ratio = self.config.schedule, self.config.warmup_ratio
        if self.config.max_seconds is None:
            return lr_factor(schedule, self.state.step, self.total, ratio * self.total)
        # By time, in thousandths: how many steps there will be is not known.
        return lr_factor(schedule, self.fraction() * 1000, 1000, ratio * 1000)

    def _next_rows(self) -> list[Any]:
        epoch, position = divmod(self.state.step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        first = position * self.config.rows_per_step
        return [self.rows[i] for i in self._order[first : first + self.config.rows_per_step]]


@torch.no_grad()
def evaluate_rows(
    rows: Sequence[R],
    measure: Callable[[Sequence[R]], list[Metric]],
    tokens_per_microbatch: int,
    mesh: Mesh = ALONE,
) -> list[Metric]:
    """`measure` over length-sorted microbatches of all rows, without gradients, merged exactly,
    also over processes."""
    found: list[Metric] = []
    for part, counts in shares([len(row) for row in rows], tokens_per_microbatch, mesh.data):
        measured = measure([rows[i] for i in part])
        found += measured if counts else []
    return mesh.data.gather_metrics(found)


def _check_same(run: str, ranks: Ranks) -> None:
    """Raises Fatal on a rank that read other rows or another config than the first one."""
    if ranks.from_first(run) != run:
        raise Fatal(
            f"process {ranks.rank} of {ranks.size} has another configuration or other rows than "
            "the first one: every host needs the same files under the same paths"
        )


def _numbers(metrics: Sequence[Metric]) -> dict[str, float]:
    return {name: metric.value for name, metric in merge(metrics).items()}
