"""A rollout worker: prompts in, finished and scored groups out, weights swapped on the way.

submit ──▶ engine thread ──▶ finished groups ──▶ scoring threads ──▶ harvest
              ▲ between two steps
load_weights: fetch, verify, stage ──▶ swap ──▶ canary ──▶ proof
              caller's thread          engine thread       caller's thread
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from actors.canary import CanaryCheck
from actors.engine_thread import EngineThread
from actors.scoring import Decode, FinishedGroup, GroupScorer, rollouts_of
from actors.settings import derive_seed
from cluster.contracts.errors import AccordError, Fatal, Late, Retryable, UserError
from cluster.contracts.protocols import Engine, Scorer
from cluster.contracts.records import (
    AS_TRAINED,
    Assignment,
    Canary,
    Completion,
    Draw,
    GroupMeta,
    Harvest,
    LoraUpdate,
    Prompt,
    Rollout,
    RolloutGroup,
    SwapReport,
    WeightManifest,
)
from cluster.contracts.rollout_table import to_table
from cluster.weights.intake import Intake
from cluster.weights.manifest import check_order
from cluster.weights.transports import Receiver

LOOK_FOR_LATE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """``request_seed``: when set, each sample's randomness depends on its group and place alone,
    not on the worker that draws it (slower on CPU)."""

    name: str = "worker-0"
    incarnation: int = 0
    request_seed: int | None = None
    start_timeout_s: float = 180.0
    swap_timeout_s: float = 120.0
    stop_timeout_s: float = 10.0
    scoring_threads: int = 2  # one waits for the reward service while the other prepares a call
    score_batch: int = 64  # most rollouts in one call of the scorer
    reward_outage_s: float = 300.0  # for so long finished groups wait for a scorer that is away
    precision: str | None = None  # `EngineSettings.precision`; None: the manifest's
    request_timeout_s: float = 0.0  # from the engine's being given a group to its end; 0: no limit
    worth_telling: int = 8  # samples that have finished end a harvest, though no group has


class Merger(Protocol):
    def whole(
        self, update: LoraUpdate, tensors: Iterable[tuple[str, Any]]
    ) -> Iterable[tuple[str, Any]]:
        """The whole model of an adapter's tensors, to be gone through once."""
        ...


@dataclass(slots=True)
class _Open:
    """A group being generated; only the engine thread looks inside."""

    assignment: Assignment
    deliver: Callable[[FinishedGroup], None]
    completions: dict[int, Completion] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)


class RolloutWorker:
    """Thread-safe; every wait has a deadline. ``make_scorer`` None: only ``sample`` may be used.
    ``make_merger``: makes what merges adapters (LoRA), when the first one comes."""

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        decode: Decode,
        receiver: Receiver | None,
        make_scorer: Callable[[], Scorer] | None,
        settings: WorkerSettings,
        make_merger: Callable[[], Merger] | None = None,
    ) -> None:
        self._settings = settings
        self._decode = decode
        self._intake = None if receiver is None else Intake(receiver, settings.swap_timeout_s)
        self._thread = EngineThread(make_engine, self._sample_done, self._fail, settings.name)
        self._make_scorer = make_scorer
        self._make_merger = make_merger
        self._merger: Merger | None = None
        self._scoring: GroupScorer | None = None
        self._open: dict[str, _Open] = {}
        self._numbers = itertools.count()
        self._news = threading.Condition()
        self._finished: list[tuple[GroupMeta, RolloutGroup | None]] = []
        # (group, attempt) not harvested yet -> how many of its samples are finished
        self._pending: dict[tuple[int, int], int] = {}
        self._untold = 0  # samples finished since the last harvest
        self._failure: BaseException | None = None
        self._swap_lock = threading.Lock()
        self._canaries: dict[str, CanaryCheck] = {}  # by adapter
        self._looked_for_late = time.perf_counter()
        self._unproven = False  # swapped in, not proven yet: nothing leaves the worker
        self._version: int | None = None
        self._swaps = 0
        self._pause_s = 0.0

    def start(self) -> dict[str, object]:
        """Build the engine, and connect to the scorer meanwhile; returns the engine's name, the
        process id and the seconds that took."""
        began = time.perf_counter()
        self._thread.begin()
        # The reward service may still be starting: making its client waits for it, while the
        # engine, which takes longest, is built on its own thread.
        if self._make_scorer is not None:
            self._scoring = GroupScorer(
                self._make_scorer(),
                self._decode,
                self._scored,
                self._fail,
                threads=self._settings.scoring_threads,
                batch=self._settings.score_batch,
                outage_s=self._settings.reward_outage_s,
            )
        engine = self._thread.ready(self._settings.start_timeout_s)
        seconds = round(time.perf_counter() - began, 3)
        return {"engine": engine, "pid": os.getpid(), "engine_s": seconds}

    # -- generation -------------------------------------------------------------------------------

    def submit(self, assignments: Sequence[Assignment]) -> None:
        """Start generating; the same group and attempt again is ignored.

        Raises Fatal before the first ``load_weights``: a restarted worker would sample from the
        model it was started from.
        """
        if self._scoring is None:
            raise Fatal(f"{self._settings.name} has no scorer, so it cannot make training data")
        if self._version is None:
            raise Fatal(f"{self._settings.name} was given work before it was given weights")
        with self._news:
            self._raise_failure()
            fresh = []
            for assignment in assignments:
                key = (assignment.group_id, assignment.attempt)
                if key not in self._pending:
                    self._pending[key] = 0
                    fresh.append(assignment)
        self._begin(fresh, self._scoring.put)

    def sample(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        timeout_s: float,
        draw: Draw = AS_TRAINED,
    ) -> list[Rollout]:
        """All samples of all prompts, unscored, in order; for evaluation and for people to compare.
        ``draw``: how they are sampled.

        Raises UserError for a prompt the engine cannot take, Retryable past the deadline; what is
        unfinished then is dropped.
        """
        done: queue.SimpleQueue[FinishedGroup] = queue.SimpleQueue()
        asked = [
            Assignment(group_id=place, prompt=prompt, samples=samples)
            for place, prompt in enumerate(prompts)
        ]
        self._begin(asked, done.put, draw)
        deadline = time.monotonic() + timeout_s
        groups: dict[int, FinishedGroup] = {}
        try:
            # As with a harvest, nothing is handed out between a swap and its proof.
            while len(groups) < len(prompts) or self._unproven:
                with self._news:
                    self._raise_failure()
                left = deadline - time.monotonic()
                if left <= 0:
                    raise Retryable(
                        f"{len(prompts) - len(groups)} of {len(prompts)} prompts had no answer "
                        f"within {timeout_s:.0f} s"
                    )
                try:
                    group = done.get(timeout=min(left, 0.5))
                except queue.Empty:
                    continue
                if group.problem is not None:
                    raise group.problem
                groups[group.assignment.group_id] = group
        except AccordError:
            self._drop(done.put)
            raise
        in_order = [groups[place] for place in range(len(prompts))]
        return [rollout for answer in rollouts_of(in_order, self._decode) for rollout in answer]

    def _drop(self, deliver: Callable[[FinishedGroup], None]) -> None:
        """Have the engine forget what was to be delivered there: nobody waits for it any more."""

        def drop(engine: Engine) -> None:
            gone = [i for i, group in self._open.items() if group.deliver == deliver]
            engine.abort(gone)
            for request_id in gone:
                del self._open[request_id]

        with contextlib.suppress(AccordError):  # the engine's thread has ended
            self._thread.post(drop).add_done_callback(self._surface)

    def harvest(self, timeout_s: float) -> Harvest:
        """Groups finished since the last call; waits for the first, at most ``timeout_s``, or for
        as many finished samples as make room for more groups.

        ``payload`` is the Arrow table itself. Raises what made the worker unfit: BadReward, Fatal.
        Between a swap and its proof nothing is handed out: were the proof to fail, the versions
        recorded with those tokens would be wrong.
        """
        self._look_for_late()
        with self._news:
            self._news.wait_for(
                lambda: (
                    (self._finished and not self._unproven)
                    or self._failure
                    or self._untold >= self._settings.worth_telling
                ),
                timeout_s,
            )
            self._raise_failure()
            finished: list[tuple[GroupMeta, RolloutGroup | None]] = []
            if not self._unproven:
                finished, self._finished = self._finished, finished
            for meta, _ in finished:
                self._pending.pop((meta.group_id, meta.attempt), None)
            self._untold = 0
            sampled = float(sum(self._pending.values()))
        groups = [group for _, group in finished if group is not None]
        return Harvest(
            worker=self._settings.name,
            incarnation=self._settings.incarnation,
            groups=tuple(meta for meta, _ in finished),
            payload=to_table(groups) if groups else None,
            stats={**self.stats(), "sampled": sampled},
        )

    def stats(self) -> dict[str, float]:
        """Counters since the start (and gauges: requests unfinished, running, cache in use)."""
        thread = self._thread
        return {
            "generated_tokens": float(thread.generated_tokens),
            "busy_s": thread.busy_s,
            "wait_s": thread.wait_s,
            "cpu_s": time.process_time(),
            "unfinished": float(thread.unfinished),
            "scoring": float(self._scoring.waiting if self._scoring else 0),
            "reward_down_s": self._scoring.down_s if self._scoring else 0.0,
            "score_s": self._scoring.busy_s if self._scoring else 0.0,
            "swaps": float(self._swaps),
            "swap_pause_s": self._pause_s,
            **thread.gauges,
        }

    def _begin(
        self,
        assignments: Sequence[Assignment],
        deliver: Callable[[FinishedGroup], None],
        draw: Draw = AS_TRAINED,
    ) -> None:
        """All in one command: which of them decode together, and with it the last bits of their
        log-probabilities, never depends on when the engine's thread looked."""
        numbered = [(next(self._numbers), assignment) for assignment in assignments]

        def add(engine: Engine) -> None:
            for number, assignment in numbered:
                self._add(engine, number, assignment, deliver, draw)

        if numbered:
            self._thread.post(add).add_done_callback(self._surface)

    def _add(
        self,
        engine: Engine,
        number: int,
        assignment: Assignment,
        deliver: Callable[[FinishedGroup], None],
        draw: Draw,
    ) -> None:
        open_group = _Open(assignment, deliver)
        ids = [f"{number}/{sample}" for sample in range(assignment.samples)]
        try:
            for sample, request_id in enumerate(ids):
                engine.submit(
                    request_id,
                    assignment.prompt.token_ids,
                    self._seed(assignment, sample, draw),
                    draw.temperature,
                    assignment.prompt.policy,
                )
        except UserError as problem:
            engine.abort(ids)
            deliver(FinishedGroup(assignment, {}, problem))
            return
        self._open.update(dict.fromkeys(ids, open_group))

    def _surface(self, future: object) -> None:
        problem = future.exception()  # type: ignore[attr-defined]
        if problem is not None:
            self._fail(problem)

    def _seed(self, assignment: Assignment, sample: int, draw: Draw) -> int | None:
        if draw.seed is not None:
            return derive_seed(draw.seed, "drawn", assignment.prompt.id, sample)
        seed = self._settings.request_seed
        if seed is None:
            return None
        return derive_seed(seed, "sample", assignment.group_id, assignment.prompt.id, sample)

    def _sample_done(self, request_id: str, completion: Completion) -> None:
        group = self._open.pop(request_id, None)
        if group is None:
            return  # dropped, after the engine had finished it
        group.completions[int(request_id.rpartition("/")[2])] = completion
        if self._scoring is not None and group.deliver == self._scoring.put:
            self._count(group.assignment)
        if len(group.completions) == group.assignment.samples:
            generated = time.perf_counter()
            group.deliver(
                FinishedGroup(group.assignment, group.completions, None, group.began, generated)
            )

    def _count(self, assignment: Assignment) -> None:
        """A sample of a group that is to be harvested is finished."""
        with self._news:
            self._pending[assignment.group_id, assignment.attempt] += 1
            self._untold += 1
            if self._untold == self._settings.worth_telling:
                self._news.notify_all()

    def _look_for_late(self) -> None:
        limit = self._settings.request_timeout_s
        now = time.perf_counter()
        if limit > 0 and now - self._looked_for_late >= min(LOOK_FOR_LATE_S, limit / 10):
            self._looked_for_late = now
            self._thread.post(self._abort_late).add_done_callback(self._surface)

    def _abort_late(self, engine: Engine) -> None:
        limit, now = self._settings.request_timeout_s, time.perf_counter()
        late = {i: group for i, group in self._open.items() if now - group.began > limit}
        engine.abort(list(late))
        for request_id in late:
            del self._open[request_id]
        for group in {id(group): group for group in late.values()}.values():
            done, all_of_it = len(group.completions), group.assignment.samples
            problem = Late(
                f"{all_of_it - done} of {all_of_it} completions were not finished within "
                f"rollout.request_timeout_s = {limit:g} s"
            )
            group.deliver(FinishedGroup(group.assignment, {}, problem))

    def _scored(self, meta: GroupMeta, group: RolloutGroup | None) -> None:
        with self._news:
            self._finished.append((meta, group))
            self._news.notify_all()

    # -- weights ----------------------------------------------------------------------------------

    def load_weights(self, manifest: WeightManifest) -> SwapReport:
        """Fetch, verify and stage bucket by bucket while generation goes on, swap between two
        steps, compare the canary, and prove while generation goes on again that the new weights
        are in force.

        Raises WeightMismatch for a duplicate, late, torn or unfitting update and Retryable when
        staging fails: the worker goes on with the weights it has. Raises WeightMismatch when the
        engine holds other weights than those published or does not compute what the learner
        computes, and EngineFailure when it computes NaN: the worker is unfit from then on.
        """
        if self._intake is None:
            raise Fatal(f"{self._settings.name} was started without a weight transport")
        with self._swap_lock:
            check_order(-1 if self._version is None else self._version, manifest)
            began = time.perf_counter()
            incoming = self._intake.take(manifest)
            tensors = self._whole_model(manifest, incoming)
            self._thread.beside(lambda engine: engine.stage(tensors, manifest.version))
            incoming.require_whole()
            took_s = time.perf_counter() - began

            def swap(engine: Engine) -> tuple[float, float]:
                return self._swap(engine, manifest)

            limit = self._settings.swap_timeout_s
            what = f"take weights of version {manifest.version}"
            try:
                pause_s, difference = self._thread.call(swap, limit, what)
            # Past its deadline the swap may still be taken later, and nobody could say when: then
            # the version of no token would be certain. So the worker is given up.
            except Retryable as problem:
                self._fail(problem)
                raise
            prove_s = self._prove()
            self._version = manifest.version
            self._swaps += 1
            self._pause_s += pause_s
        return SwapReport(
            version=manifest.version,
            fetch_s=incoming.fetch_s,
            verify_s=incoming.verify_s,
            stage_s=took_s - incoming.fetch_s - incoming.verify_s,
            pause_s=pause_s,
            prove_s=prove_s,
            canary_logp_diff=difference,
        )

    def _whole_model(
        self, manifest: WeightManifest, incoming: Iterable[tuple[str, Any]]
    ) -> Iterable[tuple[str, Any]]:
        """What the engine takes: an adapter comes alone, and is merged here."""
        if manifest.lora is None:
            return incoming
        if self._merger is None:
            if self._make_merger is None:
                raise Fatal(f"{self._settings.name} was sent an adapter and has no base for it")
            self._merger = self._make_merger()
        return self._merger.whole(manifest.lora, incoming)

    def _swap(self, engine: Engine, manifest: WeightManifest) -> tuple[float, float]:
        # Before the swap, not after it: a group could finish and be harvested in between.
        with self._news:
            self._unproven = True
        began = time.perf_counter()
        try:
            engine.swap(manifest.version)
            pause_s = time.perf_counter() - began
            difference = max(
                self._compare(engine, canary, manifest)
                for canary in (manifest.canary, *manifest.more_canaries)
            )
        except Exception as problem:
            self._thread.break_off(problem)
            raise
        return pause_s, difference

    def _compare(self, engine: Engine, canary: Canary, manifest: WeightManifest) -> float:
        check = self._canaries.setdefault(canary.adapter, CanaryCheck())
        got = engine.sequence_logprobs(canary.token_ids, canary.adapter)
        dtype = self._settings.precision or manifest.dtype
        return check.compare(canary, got, manifest.version, dtype)

    def _prove(self) -> float:
        """Seconds it took. Raises WeightMismatch when the swap did not do what it was to do."""
        began = time.perf_counter()
        try:
            self._thread.beside(lambda engine: engine.prove())
        except Exception as problem:
            self._thread.break_off(problem)
            raise
        with self._news:
            self._unproven = False
            self._news.notify_all()
        return time.perf_counter() - began

    # -- end --------------------------------------------------------------------------------------

    def stop(self) -> None:
        """End all threads and free the engine; what is unfinished is dropped."""
        if self._scoring is not None:
            self._scoring.stop()
        if self._intake is not None:
            self._intake.close()
        self._thread.stop(self._settings.stop_timeout_s)

    def _fail(self, problem: BaseException) -> None:
        with self._news:
            self._failure = self._failure or problem
            self._news.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
