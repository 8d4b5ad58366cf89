"""What a scorer reads and answers, inside the reward service."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.contracts.config.base import DType
from cluster.contracts.records import Message, Prompt
from reward_service.access import Access


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreItem:
    """One completion to be scored. ``tokenizer``: fingerprint the token ids belong to ("" unknown).

    ``where``: file and row of its prompt and which of the completions it is, for messages.
    """

    id: str
    messages: tuple[Message, ...]
    response: str
    prompt_ids: tuple[int, ...] = ()
    response_ids: tuple[int, ...] = ()
    finish_reason: str = "stop"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str = ""
    where: str = ""

    @property
    def label(self) -> str:
        """What a person finds the completion by."""
        return self.where or f"item {self.id!r}"


@dataclass(frozen=True, slots=True)
class Part:
    """One source's unweighted number for one item, the rules the answer broke, and what the number
    was made of, for the record."""

    value: float
    vetoes: tuple[str, ...] = ()
    detail: Mapping[str, float] = field(default_factory=dict)


class Source(Protocol):
    """One reward among those that are summed.

    ``content`` is a hash of everything that decides its numbers; ``tokenizer`` the fingerprint of
    the tokenizer of a scoring model, "" for the others. ``score`` returns one ``Part`` an item, in
    order, or raises BadReward (unusable answer) or RewardFailure (may work later); it never invents
    a number.
    """

    name: str
    type: str
    content: str
    tokenizer: str

    def score(self, items: Sequence[ScoreItem]) -> list[Part]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceContext:
    """What the service gives a source that it loads. A kind of reward is the module of its name in
    `reward_service/sources/`, with `make(source, context) -> Source` and `check(source, prompts)`,
    which raises UserError for what can be found wrong before anything is started.

    threads: of torch. device: of models, "auto", "cpu" or "cuda". dtype: that models compute in;
    None: bfloat16 on a GPU, float32 on a CPU. access: what lets a source of
    type grpc in (None: it reads that itself).
    """

    threads: int = 1
    device: str = "auto"
    dtype: DType | None = None
    deadline_s: float = 30.0
    access: Access | None = None


TRIAL_COMPLETIONS = ("A trial completion.", "")  # a policy may write nothing at all


def trial_items(prompts: Sequence[Prompt]) -> list[ScoreItem]:
    """The first prompt with two completions, to try a source on before anything is started."""
    return [
        ScoreItem(
            id=f"trial-{number}",
            messages=prompts[0].messages,
            response=text,
            metadata=prompts[0].metadata,
            where=f"{prompts[0].where}, trial completion {text!r}",
        )
        for number, text in enumerate(TRIAL_COMPLETIONS)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceInfo:
    name: str
    type: str
    weight: float
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceInfo:
    """What a service says of itself; ``scorer_version`` changes with all that changes a score."""

    name: str
    scorer_version: str
    sources: tuple[SourceInfo, ...]
    max_batch: int
    tokenizer: str
