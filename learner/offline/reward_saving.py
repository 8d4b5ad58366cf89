"""A trained reward model as a directory: centred, with golden scores, complete."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from cluster.contracts.errors import UserError
from learner.compute.microbatches import TokenRow
from learner.compute.optimizer import compute_in
from learner.compute.sharding import bare
from learner.model_files import put_together
from learner.models.files import load_checked, replace_directory
from learner.models.heads import reward_scores
from learner.models.reward_artifact import (
    Golden,
    RewardArtifact,
    read_artifact,
    template_hash,
    tokenizer_fingerprint,
    write_artifact,
)
from learner.offline.reward_task import RewardTask, Scores
from learner.offline.saving import parts_on_disk, whole_tensors


def spread_of(centre: Scores) -> float:
    """Standard deviation of [N, K] raw scores on which the scale is set, of the members' mean.

    Raises UserError when the scores do not differ: such a model rewards everything the same.
    """
    means = centre.mean(axis=1)
    spread = float(means.std())
    if not spread > 1e-6:
        raise UserError(
            f"the reward model gives all {len(means)} completions the same score",
            where="centre",
            fix="train it for longer or with a higher fit.lr, or give more completions",
        )
    return spread


def save_reward_model(
    task: RewardTask,
    tokenizer: Any,
    centre: Scores,
    centred_on: str,
    golden: Sequence[TokenRow],
    directory: Path,
) -> Path:
    """Write the directory. Every process calls it, the first one writes, and none returns before.

    centre: see `spread_of`. golden: completions whose scores show on loading that the very same
    function is served; a model that is whole moves to the CPU for them.
    """
    ranks = task.mesh.everyone
    with parts_on_disk(task.model, directory, ranks) as parts:
        tensors = whole_tensors(task.model, ranks.first) if parts is None else {}

        def write(folder: Path) -> None:
            bare(task.model).save_pretrained(folder, state_dict=tensors)
            if parts is not None:
                put_together(parts, folder)
            tokenizer.save_pretrained(folder)
            scorer = task.model.to("cpu") if tensors is None else _loaded(folder)
            scores = tuple(_golden(scorer, row) for row in golden)
            artifact = _artifact(task, tokenizer, centre, centred_on, scores)
            error = _bfloat16_error(scorer, golden, scores)
            write_artifact(folder, replace(artifact, bfloat16_error=error))

        if ranks.first:
            replace_directory(directory, write)
    return directory


def _artifact(
    task: RewardTask, tokenizer: Any, centre: Scores, centred_on: str, golden: tuple[Golden, ...]
) -> RewardArtifact:
    return RewardArtifact(
        tokenizer=tokenizer_fingerprint(tokenizer),
        template=template_hash(tokenizer),
        centre_mean=float(centre.mean(axis=1).mean()),
        centre_std=spread_of(centre),
        centred_on=centred_on,
        max_tokens=task.config.fit.max_tokens,
        golden=golden,
        member_means=tuple(map(float, centre.mean(axis=0))) if centre.shape[1] > 1 else (),
    )


def _loaded(folder: Path) -> Any:
    """The model that a folder holds: a sharded one gives its golden scores as it will be served."""
    return load_checked(transformers.AutoModelForSequenceClassification, str(folder), None, False)


def gather_members(folders: Sequence[Path], directory: Path) -> Path:
    """One directory of an ensemble of whole models: the first, and the others in folders below it,
    so that what wants a single model (a value network, say) finds the first."""

    def write(folder: Path) -> None:
        shutil.copytree(folders[0], folder, dirs_exist_ok=True)
        others = [f"member-{number}" for number in range(1, len(folders))]
        for name, source in zip(others, folders[1:], strict=True):
            shutil.copytree(source, folder / name)
        write_artifact(folder, replace(read_artifact(folders[0]), others=tuple(others)))

    return replace_directory(directory, write)


@torch.no_grad()
def _golden(model: Any, row: TokenRow) -> Golden:
    ids = torch.as_tensor(row.input_ids, dtype=torch.int64)[None]
    score = float(reward_scores(model, ids, torch.ones_like(ids))[0])
    return Golden(token_ids=tuple(int(i) for i in row.input_ids), score=score)


def _bfloat16_error(model: Any, rows: Sequence[TokenRow], scores: Sequence[Golden]) -> float | None:
    """See `RewardArtifact`: by it a service chooses the type that it computes in."""
    if not rows:
        return None
    with compute_in("bfloat16", "cpu"):
        short = [_golden(model, row).score for row in rows]
    return max(abs(one - golden.score) for one, golden in zip(short, scores, strict=True))


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
