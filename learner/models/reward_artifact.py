"""What a reward model's directory says about itself (`accord_reward.json`), beside its weights.

Train and serve share tokenizer, template, length limit and scale through it; its golden scores show
on loading that the very same function is served.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.contracts.errors import UserError

FILE = "accord_reward.json"
SCHEMA = "accord.reward/1"
BFLOAT16_TOLERANCE = 0.1
"""How far a score in bfloat16 may be off, in standard deviations of the model's scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """Ids of one answered prompt and the raw score they had when the model was saved."""

    token_ids: tuple[int, ...]
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardArtifact:
    """normalised = (raw - centre_mean) / centre_std, both measured on completions of the policy (or
    on those of the training rows; `centred_on` says which).

    With several heads on the trunk, raw is their mean, and `member_means` holds each head's own
    mean. others: folders below this one that hold the further models of an ensemble of whole ones.
    bfloat16_error: how far the golden scores were off at most in bfloat16, when they were saved;
    None: nobody looked.
    """

    tokenizer: str
    template: str
    centre_mean: float
    centre_std: float
    centred_on: str
    max_tokens: int
    golden: tuple[Golden, ...]
    member_means: tuple[float, ...] = ()
    others: tuple[str, ...] = ()
    bfloat16_error: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.centre_mean) and 0 < self.centre_std < math.inf):
            raise ValueError(f"centre {self.centre_mean} ± {self.centre_std} is unusable")

    @property
    def keeps_scores_in_bfloat16(self) -> bool:
        """Whether they were off by less than half of what is accepted on loading."""
        error = self.bfloat16_error
        return error is not None and error < BFLOAT16_TOLERANCE / 2 * self.centre_std

    def normalise(self, raw: float) -> float:
        return (raw - self.centre_mean) / self.centre_std

    def normalise_members(self, raw: Sequence[float]) -> list[float]:
        """Each head's score less its own mean, on one scale: their mean is `normalise` of the
        mean."""
        means = self.member_means or (self.centre_mean,)
        return [(one - mean) / self.centre_std for one, mean in zip(raw, means, strict=True)]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hex SHA-256 of the sorted vocabulary and the chat template."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    text = json.dumps([vocabulary, tokenizer.chat_template], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def template_hash(tokenizer: Any) -> str:
    """Hex SHA-256 of the chat template alone (of the empty text where there is none)."""
    text = json.dumps(tokenizer.chat_template, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def write_artifact(directory: Path, artifact: RewardArtifact) -> None:
    content = {"schema": SCHEMA, **dataclasses.asdict(artifact)}
    text = json.dumps(content, indent=2, allow_nan=False)
    (directory / FILE).write_text(text + "\n", encoding="utf-8")


def read_artifact(directory: Path) -> RewardArtifact:
    """Raises UserError when the file is missing, damaged, or of another layout."""
    where = str(directory / FILE)
    again = "make it again with `accord reward-model`"
    try:
        content = json.loads((directory / FILE).read_text(encoding="utf-8"))
        if content.pop("schema") != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        golden = tuple(
            Golden(token_ids=tuple(row["token_ids"]), score=float(row["score"]))
            for row in content.pop("golden")
        )
        content |= {key: tuple(content.get(key, ())) for key in ("member_means", "others")}
        return RewardArtifact(**content, golden=golden)
    except FileNotFoundError:
        raise UserError(
            "not a reward model made by Accord (the file is missing)", where=where, fix=again
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"damaged: {problem}", where=where, fix=again) from None


def require_same_tokenizer(path: str, tokenizer: Any) -> None:
    """Raise UserError for a reward model made with another tokenizer or template than the policy's,
    from which no value network can start."""
    if read_artifact(Path(path)).tokenizer != tokenizer_fingerprint(tokenizer):
        raise UserError(
            "this reward model was made with another tokenizer or chat template than the policy's",
            where=path,
            fix="train a reward model from the policy's model, or leave it out with "
            "learner.value_path=none (the value head then starts at 0)",
        )
