"""A scalar reward learnt from comparisons (Bradley-Terry) on the policy's own trunk."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster.contracts.config.offline import RewardModelConfig
from cluster.contracts.errors import UserError
from cluster.contracts.metrics import Metric, last, mean, merge
from learner.algorithms.reward_loss import bradley_terry
from learner.compute.microbatches import TokenRow, pad_rows, plan_microbatches
from learner.compute.optimizer import compute_in
from learner.compute.optimizer_step import metrics_of
from learner.evaluation.calibration import confidences, ece, reliability
from learner.models.files import replace_directory
from learner.models.heads import reward_scores
from learner.models.load import load_sequence_classifier, load_tokenizer, stop_token_ids
from learner.models.reward_artifact import (
    Golden,
    RewardArtifact,
    template_hash,
    tokenizer_fingerprint,
    write_artifact,
)
from learner.offline.datasets import Comparison, read_comparisons, read_demonstrations
from learner.offline.fit import OnStep, fit, never
from learner.offline.setup import (
    OnRows,
    answered,
    encode_all,
    load_rows,
    prepare,
    unheard,
    write_summary,
)
from learner.offline.sft import encode as encode_demonstration

GOLDEN_ROWS = 4
CALIBRATION_BINS = 20
"""Over [0, 1]; certainty is never under 0.5, so that 10 of them can hold pairs."""


@dataclass(frozen=True, slots=True)
class PairRow:
    chosen: TokenRow
    rejected: TokenRow
    margin: float

    def __len__(self) -> int:
        return 2 * self.longest

    @property
    def longest(self) -> int:
        return max(len(self.chosen), len(self.rejected))

    @property
    def weight(self) -> float:
        return 1.0


def train_reward_model(
    config: RewardModelConfig,
    run_dir: Path,
    progress: OnStep | None = None,
    centre_rows: str | Path | None = None,
    should_stop: Callable[[], bool] = never,
    on_rows: OnRows = unheard,
) -> Path:
    """Train on comparisons; returns run_dir/reward_model, for `models.load.load_reward_model`.

    centre_rows: JSONL or Parquet of prompts with answers of the SFT policy (prompt + completion, or
    messages); their scores give the mean and spread that rewards are normalised with. None: the
    answers of the training pairs. Reports train/{loss,accuracy,margin,...} and, on held-out pairs,
    rm/{loss,accuracy,margin,ece}, whose calibration by bins goes to run_dir/reliability.json.
    Continues as `train_sft` does; stopped early, it leaves its checkpoint and returns that folder.
    """
    device = prepare(config.fit, config.run.seed)
    tokenizer = load_tokenizer(config.model)
    skip_bad, limit = config.data.skip_bad_rows, config.fit.max_tokens
    read = read_comparisons(config.data.path, config.data.split, skip_bad)
    if config.use_margin:
        _require_margins(read.items)
    data = load_rows(read, tokenizer, encode, lambda row: row.longest, config.fit, skip_bad)
    on_rows(data)
    rows, eval_rows = data.train, data.held
    centre = None if centre_rows is None else _read_centre(str(centre_rows), tokenizer, limit)
    task = RewardTask(_fresh_classifier(config, tokenizer).to(device), config, device)
    run_dir.mkdir(parents=True, exist_ok=True)
    result = fit(
        task.model,
        rows,
        task.loss,
        config.fit,
        seed=config.run.seed,
        evaluate=(lambda: task.evaluate(eval_rows)) if eval_rows else None,
        on_step=progress,
        should_stop=should_stop,
        checkpoint=run_dir / "checkpoints",
    )
    write_summary(run_dir, result, data)
    if not result.finished:  # half a model, whose centring would take long: only its checkpoint
        return run_dir / "checkpoints"
    if eval_rows:
        _write_reliability(run_dir, task, eval_rows)
    return _save(task, tokenizer, run_dir / "reward_model", eval_rows or rows, centre, rows)


def encode(tokenizer: Any, row: Comparison) -> PairRow:
    return PairRow(
        chosen=answered(tokenizer, row.messages, row.chosen),
        rejected=answered(tokenizer, row.messages, row.rejected),
        margin=row.margin or 0.0,
    )


@dataclass(frozen=True, slots=True)
class RewardTask:
    model: Any
    config: RewardModelConfig
    device: torch.device

    def scores(self, rows: Sequence[TokenRow]) -> Tensor:
        """[B] raw scores of one padded batch."""
        batch = pad_rows(rows, self.model.config.get_text_config().pad_token_id, self.device)
        with compute_in(self.config.model.dtype, self.device):
            return reward_scores(self.model, batch.input_ids, batch.attention_mask)

    def pair_scores(self, rows: Sequence[PairRow]) -> tuple[Tensor, Tensor]:
        both = self.scores([row.chosen for row in rows] + [row.rejected for row in rows])
        chosen, rejected = both.chunk(2)
        return chosen, rejected

    def loss(self, rows: Sequence[PairRow], denominator: float) -> tuple[Tensor, list[Metric]]:
        chosen, rejected = self.pair_scores(rows)
        margin = chosen.new_tensor([row.margin for row in rows]) if self.config.use_margin else None
        terms = bradley_terry(chosen, rejected, margin, self.config.centre_coef)
        total = terms.losses.sum()
        measured = mean("train/loss", float(total.detach()), len(rows))
        return total / denominator, [measured, *metrics_of(terms.metrics, "train/")]

    @torch.no_grad()
    def evaluate(self, rows: Sequence[PairRow]) -> list[Metric]:
        """rm/{loss,accuracy,margin,ece,...} of pairs; the loss is the plain one, without margin and
        centring, so that runs compare."""
        found: list[Metric] = []
        gaps: list[float] = []
        plan = plan_microbatches([len(r) for r in rows], self.config.fit.tokens_per_microbatch)
        for part in plan:
            chosen, rejected = self.pair_scores([rows[i] for i in part])
            terms = bradley_terry(chosen, rejected)
            found.append(mean("rm/loss", float(terms.losses.sum()), len(part)))
            found += metrics_of(terms.metrics, "rm/")
            gaps += (chosen - rejected).tolist()
        return [*merge(found).values(), last("rm/ece", ece(*confidences(gaps), CALIBRATION_BINS))]

    @torch.no_grad()
    def score_all(self, rows: Sequence[TokenRow]) -> list[float]:
        """Raw scores in the order of `rows`."""
        scores: dict[int, float] = {}
        budget = self.config.fit.tokens_per_microbatch
        for part in plan_microbatches([len(row) for row in rows], budget):
            batch = self.scores([rows[i] for i in part]).tolist()
            scores.update(zip(part, batch, strict=True))
        return [scores[i] for i in range(len(rows))]

    def centre_on(self, rows: Sequence[TokenRow]) -> tuple[float, float]:
        """(mean, standard deviation) of the raw scores of answered prompts.

        Raises UserError when they do not differ: such a model rewards everything the same.
        """
        scores = self.score_all(rows)
        spread = statistics.pstdev(scores)
        if not spread > 1e-6:
            raise UserError(
                f"the reward model gives all {len(scores)} answers the same score",
                where="centre",
                fix="train it for longer or with a higher fit.lr, or give more answers",
            )
        return statistics.fmean(scores), spread


def _write_reliability(run_dir: Path, task: RewardTask, rows: Sequence[PairRow]) -> None:
    """How often the model is right at each certainty, as `learner.evaluation.calibration` says."""
    sides = task.score_all([side for row in rows for side in (row.chosen, row.rejected)])
    gaps = [chosen - rejected for chosen, rejected in zip(sides[::2], sides[1::2], strict=True)]
    bins = [bucket.as_record() for bucket in reliability(*confidences(gaps), CALIBRATION_BINS)]
    partial = run_dir / ".reliability.json.part"
    partial.write_text(json.dumps(bins, indent=2) + "\n", encoding="utf-8")
    partial.replace(run_dir / "reliability.json")


def reward_padding_id(tokenizer: Any, ends: Sequence[int]) -> int:
    """A padding id that never ends an answer.

    transformers finds a row's last token as the last one that is not padding, so a padding id that
    is also an end token would make it read the score one token early. Raises UserError when the
    tokenizer's own cannot serve and it has no unused special token either.
    """
    own = tokenizer.pad_token_id
    if own is not None and own not in ends:
        return int(own)
    used = {*ends, tokenizer.bos_token_id, tokenizer.eos_token_id}
    named = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    spare = [i for i in named if i not in used]
    # Names such as <|finetune_right_pad_id|> and <|reserved_special_token_7|> say they are free.
    for word in ("pad", "reserved", "unk", "unused"):
        for i in spare:
            if word in tokenizer.added_tokens_decoder[i].content.lower():
                return int(i)
    raise UserError(
        "the tokenizer's padding token is also an end token, and no other special token is free",
        where=str(tokenizer.name_or_path),
        fix="set pad_token in its tokenizer_config.json to a token of its own",
    )


def _fresh_classifier(config: RewardModelConfig, tokenizer: Any) -> Any:
    ends = stop_token_ids(config.model.path, tokenizer, config.model.revision)
    model = load_sequence_classifier(config.model, pad_token_id=reward_padding_id(tokenizer, ends))
    # Small and random: from zeros, the trunk would get no gradient until the head has grown.
    nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    return model


def _require_margins(rows: Sequence[Comparison]) -> None:
    for row in rows:
        if row.margin is None:
            raise UserError(
                "has no margin, but use_margin is set",
                where=row.where,
                fix="give every row a number `margin`, or set use_margin=false",
            )


def _read_centre(path: str, tokenizer: Any, max_tokens: int) -> list[TokenRow]:
    demonstrations = read_demonstrations(path).items
    rows = encode_all(demonstrations, tokenizer, encode_demonstration, len, max_tokens).rows
    if len(rows) < 2:
        raise UserError(
            f"{len(rows)} usable rows cannot centre a reward model",
            where=path,
            fix="give at least two answered prompts within fit.max_tokens (some hundreds are good)",
        )
    return rows


def _save(
    task: RewardTask,
    tokenizer: Any,
    directory: Path,
    golden: Sequence[PairRow],
    centre: Sequence[TokenRow] | None,
    rows: Sequence[PairRow],
) -> Path:
    pairs = [side for row in rows for side in (row.chosen, row.rejected)]
    middle, spread = task.centre_on(pairs if centre is None else centre)
    samples = [row for pair in golden[: GOLDEN_ROWS // 2] for row in (pair.chosen, pair.rejected)]
    model = task.model.to("cpu")
    artifact = RewardArtifact(
        tokenizer=tokenizer_fingerprint(tokenizer),
        template=template_hash(tokenizer),
        centre_mean=middle,
        centre_std=spread,
        centred_on="training pairs" if centre is None else "answers of the starting policy",
        max_tokens=task.config.fit.max_tokens,
        golden=tuple(_golden(model, row) for row in samples),
    )

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_artifact(folder, artifact)

    return replace_directory(directory, write)


@torch.no_grad()
def _golden(model: Any, row: TokenRow) -> Golden:
    ids = torch.as_tensor(row.input_ids, dtype=torch.int64)[None]
    score = float(reward_scores(model, ids, torch.ones_like(ids))[0])
    return Golden(token_ids=tuple(int(i) for i in row.input_ids), score=score)
