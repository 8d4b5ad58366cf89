"""What the roles promise each other. Fakes of these drive the controller in unit tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cluster.contracts.durable import FileDigest
from cluster.contracts.records import (
    AS_TRAINED,
    Assignment,
    Completion,
    Draw,
    Harvest,
    Prompt,
    Rollout,
    RunState,
    Score,
    StepInput,
    StepResult,
    SwapReport,
    WeightManifest,
)


class Engine(Protocol):
    """A generation engine inside a worker's process, driven by one thread.

    Every method but ``stage`` is called from that thread only, so a weight swap falls exactly
    between two decode steps. ``submit`` takes one request per sample; requests finish in any order.
    """

    name: str  # "vllm" or "transformers", with the version

    def submit(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        seed: int | None,
        temperature: float | None = None,
        adapter: str = "",
    ) -> None:
        """``temperature`` None: that of the engine's settings. ``adapter``: which of its LoRA
        adapters answers; "": the model itself. Raises UserError for a name it does not know."""
        ...

    def step(self) -> list[tuple[str, Completion]]:
        """One decode step for everything running; returns what finished."""
        ...

    def abort(self, request_ids: Sequence[str]) -> None: ...

    @property
    def unfinished(self) -> int: ...

    def stage(self, tensors: Iterable[tuple[str, Any]], version: int) -> None:
        """Prepare all weights (name, host array or tensor) beside those in force, as they come: no
        tensor is kept after the next one was asked for.

        Called from another thread while the engine steps, one call at a time. Whatever it raises,
        and whatever going through ``tensors`` raises, the engine goes on with the weights it has.
        """
        ...

    def swap(self, version: int) -> None:
        """Put the staged weights in force, between two steps; takes no longer than a step."""
        ...

    def prove(self) -> None:
        """Raise WeightMismatch unless the next step computes with exactly what was staged last.

        Called after ``swap`` from another thread, while the engine steps. It looks at the tensors
        in force, however fused or packed, not at what ``swap`` says it did.
        """
        ...

    def sequence_logprobs(self, token_ids: Sequence[int], adapter: str = "") -> list[float]:
        """Log-probabilities of token_ids[1:] at temperature 1 under the current weights."""
        ...

    def close(self) -> None: ...


class Scorer(Protocol):
    """Scores finished rollouts; raises RewardFailure or BadReward, never invents a number."""

    version: str

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]: ...


class WorkerHandle(Protocol):
    """A rollout worker as the pool sees it. ``incarnation`` changes with each restart."""

    name: str
    incarnation: int

    async def placed(self) -> None:
        """Wait until the cluster has room for it and its process runs: as long as that takes."""
        ...

    async def start(self) -> Mapping[str, Any]: ...

    async def submit(self, assignments: Sequence[Assignment]) -> None: ...

    async def harvest(self, timeout_s: float) -> Harvest: ...

    async def load_weights(self, manifest: WeightManifest) -> SwapReport: ...

    async def sample(
        self, prompts: Sequence[Prompt], samples: int, timeout_s: float, draw: Draw = AS_TRAINED
    ) -> list[Rollout]:
        """All samples of all prompts, in order, unscored, beside what it generates for training.
        Raises Retryable past the deadline."""
        ...

    async def stop(self) -> None: ...


class LearnerHandle(Protocol):
    """The learner as the controller sees it."""

    async def start(self, step: int | None = None) -> WeightManifest:
        """Load models (or the checkpoint); the manifest publishes the weights it starts from.
        Asked again after LearnerLost, it starts another learner, from the newest checkpoint and
        the rollouts saved since, to go on at ``step``."""
        ...

    async def lost(self) -> None:
        """Waits until its process has ended without being asked to, and raises LearnerLost."""
        ...

    def fetch_ahead(self, payloads: Sequence[Any]) -> None:
        """Called while a step goes on: begin to bring the payloads of the next one to the learner.
        Returns at once, and promises nothing: what does not arrive, ``step`` fetches itself."""
        ...

    async def work_ahead(self, batch: StepInput) -> None:
        """Called while no step goes on: compute what can be computed of some groups of the next
        step. Ends when that is done. It promises nothing, and a step that is asked meanwhile runs
        after it. What goes wrong is left to the step."""
        ...

    async def step(self, batch: StepInput) -> StepResult: ...

    async def snapshot(self) -> int:
        """Copy policy and trainer state in memory; bytes of the copy. No step may go on."""
        ...

    async def store(self, directory: str) -> tuple[FileDigest, ...]:
        """Write the copy under ``directory``, while steps go on; what was written, as it was
        hashed. Raises NotSaved where the disk does not take it."""
        ...

    async def stop(self) -> None: ...


class PromptSource(Protocol):
    """Prompts in a fixed, seekable order: ``prompt(n)`` is the n-th ever admitted."""

    def __len__(self) -> int: ...

    def prompt(self, ordinal: int) -> Prompt: ...


class Clock(Protocol):
    def now(self) -> float:
        """Seconds on a monotonic clock."""
        ...

    async def sleep(self, seconds: float) -> None: ...


class Journal(Protocol):
    """Where the controller notes what happened and keeps its checkpoints: ``cluster.runs.run``."""

    def event(self, kind: str, **detail: Any) -> None: ...

    def account(self, **row: Any) -> None:
        """A line of the books that `accord audit` checks (``cluster.runs.audit``)."""
        ...

    # These take long, beside the loop; they raise NotSaved.
    async def begin_checkpoint(self, step: int, nbytes: int) -> Path: ...

    async def commit_checkpoint(
        self, staging: Path, files: Sequence[FileDigest], state: RunState, keep: int
    ) -> Path: ...

    async def abandon_checkpoint(self, staging: Path) -> None: ...


class Sink(Protocol):
    """Receives the numbers of a step. A sink that fails is counted and reported, never fatal."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...
