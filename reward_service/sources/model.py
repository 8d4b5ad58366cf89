"""A reward model scored in batches: the very function that was trained, with its own tokenizer.

torch is imported when a model is loaded, so that a service of rules alone starts at once.
"""

from __future__ import annotations

import hashlib
import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.contracts.chat import is_text, render_answered, require_template
from cluster.contracts.config.base import DType
from cluster.contracts.config.reward import RewardModelSource
from cluster.contracts.devices import NUMBER_TYPE
from cluster.contracts.errors import BadReward, UserError
from cluster.contracts.records import Prompt
from cluster.machine.torch_state import prepare_torch
from reward_service.source import Part, ScoreItem, SourceContext

if TYPE_CHECKING:
    from learner.models.reward_artifact import RewardArtifact

log = logging.getLogger("accord.reward")

TOKENS_PER_MICROBATCH = {"cpu": 4096, "cuda": 65536}


def make(source: RewardModelSource, context: SourceContext) -> ModelScorer:
    return ModelScorer(source, context.threads, context.device, context.dtype)


def check(source: RewardModelSource, prompts: Sequence[Prompt]) -> None:
    """Everything is looked at but the numbers of the weights."""
    from learner.models.files import check_reward_model

    own_tokenizer(source)
    check_reward_model(source.path)


class ModelScorer:
    """Score of a reward-model directory; normalised with the mean and deviation stored in it. Of an
    ensemble, the members' scores as one number, with each of them and their spread beside it.

    Token ids are used as they are when they belong to the reward model's own tokenizer and
    template; otherwise messages and text are rendered with those. Rows too long for the model's
    positions are a BadReward: an answer is never cut to be scored. One thread only.

    device: see `RewardConfig.device`. dtype: of the trunk; None: bfloat16 on a GPU, float32 on a
    CPU. The head is float32. Raises UserError for a GPU that is not there, and where golden scores
    come out too far off in bfloat16.
    """

    type = "model"

    def __init__(
        self,
        source: RewardModelSource,
        threads: int = 1,
        device: str = "auto",
        dtype: DType | None = None,
    ) -> None:
        # torch: not before a model is really wanted
        from learner.models.heads import member_scores
        from learner.models.load import load_reward_members

        prepare_torch(threads)
        self.name = source.name
        self._path = source.path
        self._normalise = source.normalise
        self._tokenizer = own_tokenizer(source)
        self._combine, self._uncertainty = source.combine, source.uncertainty_coef
        self._members = load_reward_members(source.path)
        model, self._artifact = self._members[0]
        self.tokenizer = self._artifact.tokenizer
        self._scores = member_scores
        self._positions = _positions(model)
        self._device = _device(device)
        self._budget = TOKENS_PER_MICROBATCH[self._device]
        self._pad = model.config.get_text_config().pad_token_id or 0
        self._warned_long = False
        rule = f"normalise={source.normalise}"
        if self._combine != "mean":
            rule += f" {self._combine} {self._uncertainty}"
        short = (dtype or NUMBER_TYPE.on(self._device)) == "bfloat16"
        rule += " bfloat16" if short else ""
        for each, artifact in self._members:
            each.to(self._device)
            if short:
                shorten_trunk(each)
                self._check_golden(each, artifact)
        self.content = directory_hash(Path(source.path), rule)

    def score(self, items: Sequence[ScoreItem]) -> list[Part]:
        rows = [self._ids(item) for item in items]
        for item, row in zip(items, rows, strict=True):
            self._check_length(item, len(row))
        found: list[list[float]] = [[] for _ in rows]
        for batch in microbatches([len(row) for row in rows], self._budget):
            for index, values in zip(batch, self._forward([rows[i] for i in batch]), strict=True):
                found[index] = values
        return [self._part(values) for values in found]

    def _part(self, values: Sequence[float]) -> Part:
        """One number of the members', and how far they disagree."""
        mean = statistics.fmean(values)
        if len(values) == 1:
            return Part(values[0])
        spread = statistics.pstdev(values)
        value = {
            "mean": mean,
            "minimum": min(values),
            "uncertainty": mean - self._uncertainty * spread,
        }[self._combine]
        members = {f"member{number}": one for number, one in enumerate(values)}
        return Part(value, detail={"disagreement": spread, **members})

    def _ids(self, item: ScoreItem) -> list[int]:
        if item.tokenizer == self.tokenizer and item.prompt_ids and item.response_ids:
            return [*item.prompt_ids, *item.response_ids]
        if not is_text(item.messages):
            require_template(self._tokenizer, self._path)
        prompt, answer = render_answered(self._tokenizer, item.messages, item.response)
        if item.finish_reason == "length" and answer and answer[-1] == self._tokenizer.eos_token_id:
            answer = answer[:-1]  # the policy was cut off: it wrote no end token
        return [*prompt, *answer]

    def _check_length(self, item: ScoreItem, tokens: int) -> None:
        if tokens == 0:
            raise BadReward(f"{item.label} has no tokens for the reward model {self._path}")
        if self._positions is not None and tokens > self._positions:
            raise BadReward(
                f"{item.label} has {tokens} tokens, but the reward model {self._path} has "
                f"positions for {self._positions}: lower data.max_prompt_tokens or "
                "rollout.max_tokens"
            )
        if tokens > self._artifact.max_tokens and not self._warned_long:
            self._warned_long = True
            log.warning(
                "%s has %d tokens; the reward model %s was trained on rows of up to %d",
                item.label, tokens, self._path, self._artifact.max_tokens,
            )  # fmt: skip

    def _forward(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """The scores of each row by every member."""
        found: list[list[float]] = [[] for _ in rows]
        for model, artifact in self._members:
            for own, raw in zip(found, self._raw(model, rows), strict=True):
                own += artifact.normalise_members(raw) if self._normalise else raw
        return found

    def _raw(self, model: Any, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """[B][K] raw scores by one model."""
        import torch

        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self._pad, dtype=torch.int64)
        mask = torch.zeros((len(rows), width), dtype=torch.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        with torch.inference_mode():
            scores = self._scores(model, ids.to(self._device), mask.to(self._device))
        numbers: list[list[float]] = scores.tolist()
        return numbers

    def _check_golden(self, model: Any, artifact: RewardArtifact) -> None:
        from learner.models.reward_artifact import BFLOAT16_TOLERANCE

        for row in artifact.golden:
            score = statistics.fmean(self._raw(model, [row.token_ids])[0])
            if not abs(score - row.score) <= BFLOAT16_TOLERANCE * artifact.centre_std:
                raise UserError(
                    f"scores {score:.4f} in bfloat16 where it scored {row.score:.4f} when it was "
                    f"saved (standard deviation of its scores: {artifact.centre_std:.4f})",
                    where=self._path,
                    fix="set reward.dtype = 'float32', or train the reward model with a larger "
                    "margin",
                )

    def close(self) -> None:
        """Nothing outside this process is held."""


def own_tokenizer(source: RewardModelSource) -> Any:
    """The directory's tokenizer; weights are not read. Raises UserError where there is no reward
    model or its tokenizer or template is another than the one it was trained with."""
    from learner.models.load import load_tokenizer
    from learner.models.reward_artifact import read_artifact, tokenizer_fingerprint

    if not Path(source.path).is_dir():
        raise UserError(
            "no such reward-model directory",
            where=f"reward source {source.name!r}, path {source.path!r}",
            fix="give a directory made by `accord reward-model`",
        )
    artifact = read_artifact(Path(source.path))
    tokenizer = load_tokenizer(source.path)
    found = tokenizer_fingerprint(tokenizer)
    if found != artifact.tokenizer:
        raise UserError(
            "the tokenizer or chat template in the directory is not the one the reward model was "
            f"trained with (fingerprint {found[:12]}, trained with {artifact.tokenizer[:12]})",
            where=source.path,
            fix="restore the directory's tokenizer files, or train the reward model again",
        )
    return tokenizer


def microbatches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Row indices, sorted by length for little padding: rows * longest <= budget, or one row."""
    plan: list[list[int]] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if plan and (len(plan[-1]) + 1) * width <= budget:
            plan[-1].append(index)
        else:
            plan.append([index])
            width = lengths[index]
    return plan


def directory_hash(directory: Path, also: str = "") -> str:
    """Hex SHA-256 over the names and bytes of the directory's files (hidden ones left out)."""
    digest = hashlib.sha256(also.encode())
    for file in sorted(directory.rglob("*")):
        name = file.relative_to(directory)
        if not file.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        digest.update(f"\0{name.as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _device(wanted: str) -> str:
    """ "cpu" or "cuda". Raises UserError for a GPU that is not there."""
    import torch

    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise UserError(
            "no GPU that torch can use here",
            where="reward.device",
            fix="set reward.device = 'auto', or reward.gpus for the services of a run",
        )
    return "cuda" if there and wanted != "cpu" else "cpu"


def shorten_trunk(model: Any) -> None:
    """In place: the trunk's weights in bfloat16. Buffers such as rotary tables stay as they are,
    for rounding would move every position, and so does the head."""
    import torch

    for parameter in model.base_model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def _positions(model: Any) -> int | None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None
