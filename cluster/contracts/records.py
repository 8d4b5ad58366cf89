"""The records that travel between the stages, in the order they are made.

    Prompt -> Completion -> Rollout -> (Rollout, Score) -> RolloutGroup -> StepResult
                                                 learner -> WeightManifest -> workers

A stage wraps the record before it and never fills in blanks. ``None`` means "does not apply", never
"not computed yet". Standard-library types only: tensors are born in the learner.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from cluster.contracts.metrics import Metric

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt, tokenised once. ``metadata`` (columns of its row) reaches reward functions.

    ``policy``: which of the run's policies answers it; "" where there is only one. Its reward finds
    the name in the column ``policy``, too.
    ``where``: file and row it was read from, for messages; "" where that is not known.
    """

    id: str
    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    policy: str = ""
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """Tokens [start, end) of a completion were sampled from policy ``version``."""

    version: int
    start: int
    end: int


def _compact(code: str, numbers: Sequence[Any]) -> array[Any]:
    if isinstance(numbers, array) and numbers.typecode == code:
        return numbers
    return array(code, numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSets:
    """From which part of the vocabulary the tokens of a completion were sampled, run by run.

    Run i covers tokens [``ends[i - 1]``, ``ends[i]``). Its ids are the next |``counts[i]``| of
    ``ids``: with a positive count only these could be sampled, with a negative one all but these,
    with 0 all. All three are kept as arrays of int32.
    """

    ends: Sequence[int]
    counts: Sequence[int]
    ids: Sequence[int]

    def __post_init__(self) -> None:
        for name in ("ends", "counts", "ids"):
            object.__setattr__(self, name, _compact("i", getattr(self, name)))
        if len(self.ends) != len(self.counts):
            raise ValueError(f"{len(self.ends)} runs of tokens but {len(self.counts)} sets")
        if any(end <= start for start, end in pairwise((0, *self.ends))):
            raise ValueError(f"runs of tokens end at {list(self.ends)}, not one after the other")
        if sum(map(abs, self.counts)) != len(self.ids):
            raise ValueError(f"the sets count {sum(map(abs, self.counts))} ids of {len(self.ids)}")

    @property
    def tokens(self) -> int:
        """How many tokens the runs cover."""
        return self.ends[-1] if len(self.ends) else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What the engine sampled. With ``finish_reason`` "stop", ``token_ids`` has the end token, or
    those of the stop string, as its last.

    ``logprobs[i]`` is the natural-log probability of ``token_ids[i]`` under the distribution really
    sampled from (after temperature). ``versions`` covers every token exactly once, in order.
    ``sampled_from``: the part of the vocabulary they are probabilities over; None: all of it.
    Tokens and log-probabilities are kept as arrays of 4-byte numbers (int32, float32), whatever
    sequence they are given as: no Python object per token is held or sent, and
    ``numpy.frombuffer`` reads them in place.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    versions: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    sampled_from: TokenSets | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", _compact("i", self.token_ids))
        object.__setattr__(self, "logprobs", _compact("f", self.logprobs))
        n = len(self.token_ids)
        if n == 0:
            raise ValueError("a completion has no tokens")
        if len(self.logprobs) != n:
            raise ValueError(f"{n} tokens but {len(self.logprobs)} log-probabilities")
        if not math.isfinite(sum(self.logprobs)):  # of float32 numbers, so it cannot overflow
            raise ValueError("the engine returned a log-probability that is not finite")
        covered = 0
        for span in self.versions:
            if span.start != covered or span.end <= span.start:
                raise ValueError(f"version spans {self.versions} leave a gap or overlap")
            covered = span.end
        if covered != n:
            raise ValueError(f"version spans cover {covered} of {n} tokens")
        if self.sampled_from is not None and self.sampled_from.tokens != n:
            raise ValueError(f"token sets cover {self.sampled_from.tokens} of {n} tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """How completions are sampled that nothing is trained on.

    ``temperature`` None: that of the engine. ``seed``: when set, each completion's randomness
    depends on it, its prompt and its place alone, not on who samples it or what was sampled before.
    """

    temperature: float | None = None
    seed: int | None = None


AS_TRAINED = Draw()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled answer to one prompt. ``text`` is for people and reward functions."""

    prompt: Prompt
    completion: Completion
    sample_index: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A finite reward, its unweighted parts by scorer, and who computed it (a content hash)."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)
    scorer_version: str
    vetoes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, number in (("value", self.value), *self.parts.items()):
            if not math.isfinite(number):
                raise ValueError(f"score {name!r} is {number}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The controller asks a worker for one group: all samples of one prompt.

    ``group_id`` is the admission ordinal: group n belongs to learner step n // prompts_per_step.
    ``attempt`` counts re-issues after a worker was lost.
    """

    group_id: int
    prompt: Prompt
    samples: int
    attempt: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """All samples of one prompt with their scores, or the cause why there are none."""

    group_id: int
    samples: tuple[tuple[Rollout, Score], ...] = ()
    failure: str | None = None

    def __post_init__(self) -> None:
        if bool(self.samples) == (self.failure is not None):
            raise ValueError("a group has samples or a failure, exactly one of them")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMeta:
    """What the controller needs to know of a finished group; the payload stays where it is."""

    group_id: int
    attempt: int
    samples: int
    prompt_tokens: int
    response_tokens: int
    version_min: int
    version_max: int
    failure: str | None = None
    retryable: bool = False
    unrated: bool = False  # a scorer has no score for one of its completions
    late: bool = False  # aborted, as a completion was not finished by `rollout.request_timeout_s`
    # By the worker's clock: until the last sample was there, the engine's queue included; from then
    # on, until the scores were there.
    generate_s: float = field(default=0.0, compare=False)
    score_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Harvest:
    """Groups a worker finished since it was last asked.

    ``payload`` is a reference (or the bytes) of one Arrow table holding all groups without a
    failure (``cluster.contracts.rollout_table``); ``None`` when there are none.
    """

    worker: str
    incarnation: int
    groups: tuple[GroupMeta, ...]
    payload: Any
    stats: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """One comparison, ready to train on. ``margin`` is None when the annotator gave no strength."""

    id: str
    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    margin: float | None
    annotator: str
    source: str
    consent: str
    created_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of a weight update. ``checksum``: of its bytes, see ``weights.manifest``.
    ``bucket``: the number of the part of the update that it travels in."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # torch name without the prefix: "float32", "bfloat16"
    nbytes: int
    checksum: str
    bucket: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """A fixed sequence and the learner's log-probabilities of tokens[1:], at temperature 1.

    The engine computes the same after the swap. ``tolerance`` (nats) is the most by which the two
    may differ; None: what follows from the noise that the engine has shown (``actors.canary``).
    ``adapter``: which of the engine's adapters computes it; "": the only model there is.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    tolerance: float | None
    adapter: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraUpdate:
    """What makes a whole model of an update that holds an adapter alone: W + ``scale`` B A.

    ``base``: fingerprint of the base weights in ``base_dtype`` (``weights.merging``), which the
    receiver has. ``held``: how the learner holds those under adapters, which decides what numbers
    they stand for (``lora.base``). ``dtype``: the engine's, to which merged weights are rounded.
    """

    base: str
    base_dtype: str
    scale: float
    dtype: str
    held: Literal["full", "8bit", "4bit"] = "full"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """Everything a receiver needs to check an update before, while and after it is applied.
    ``lora``: where the tensors are an adapter's, to be merged; None: they are the whole model."""

    version: int
    tensors: tuple[TensorEntry, ...]
    canary: Canary
    transport: str
    locator: Any  # where to fetch: an object reference, a path, a communicator name
    lora: LoraUpdate | None = None
    more_canaries: tuple[Canary, ...] = ()  # of further adapters, where a run has several policies

    @property
    def dtype(self) -> str:
        """The type that the engine is to hold the weights in."""
        return self.tensors[0].dtype if self.lora is None else self.lora.dtype

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def buckets(self) -> int:
        """In how many parts the update travels."""
        return 1 + max((t.bucket for t in self.tensors), default=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapReport:
    """A worker's acknowledgement: it now serves ``version``, verified."""

    version: int
    fetch_s: float
    verify_s: float
    stage_s: float  # loading and packing, beside generation
    pause_s: float  # how long generation stood still
    prove_s: float  # comparing the weights in force with the published ones, beside generation
    canary_logp_diff: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """One learner step: which groups, out of which payloads.

    ``payloads`` are references of Arrow tables; each may hold groups of other steps too, so the
    learner selects by ``group_ids`` and orders by them: a step never depends on arrival order.
    ``sending``: the version that workers hold or are being sent when the step is asked for; they
    may still ask for its weights, and for those the step starts from, but for no others.
    ``kl_coef``: the KL coefficient from this step on, where a monitor changes it.
    """

    step: int
    group_ids: tuple[int, ...]
    payloads: tuple[Any, ...]
    sending: int | None = None
    kl_coef: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Outcome of one learner step: the new policy version and its published weights.

    ``not_written``: why rollouts of steps before, which were to be saved, are not on disk.
    ``smaller_microbatches``: the ``learner.tokens_per_microbatch`` with which the step was trained,
    where memory ran out with the one of the config.
    """

    step: int
    version: int
    metrics: tuple[Metric, ...]
    manifest: WeightManifest
    trained_tokens: int
    not_written: tuple[str, ...] = ()
    smaller_microbatches: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """The controller's part of a checkpoint. Group ids below ``next_group`` of finished steps are
    trained; on resume, admission continues from ``step * prompts_per_step``. ``rollbacks``: a row
    for each time that a monitor made the run go back, with the ``step`` that was given up for it
    and the step ``to`` whose weights came back."""

    step: int
    version: int
    next_group: int
    prompts_total: int
    dropped: Sequence[Mapping[str, Any]] = ()
    elapsed_s: float = 0.0
    rollbacks: Sequence[Mapping[str, Any]] = ()
