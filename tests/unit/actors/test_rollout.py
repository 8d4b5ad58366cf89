"""The worker over a scripted engine: exact versions, refused updates, failures stay failures."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from actors.rollout import RolloutWorker, WorkerSettings
from actors.settings import derive_seed
from cluster.contracts.errors import (
    BadReward,
    EngineFailure,
    Fatal,
    Resumable,
    Retryable,
    RewardFailure,
    Unexpected,
    Unrated,
    UserError,
    WeightMismatch,
)
from cluster.contracts.records import (
    Assignment,
    Canary,
    Completion,
    Draw,
    GroupMeta,
    Prompt,
    Rollout,
    Score,
    VersionSpan,
    WeightManifest,
)
from cluster.contracts.rollout_table import from_table
from cluster.weights.update import Nowhere, Update

WAIT_S = 5.0


class ScriptedEngine:
    """Sample i of prompt p takes p[0] + i tokens; token n is n; its log-probability -version/8.

    A step happens only when the test allows one (``steps``), or freely when ``steps`` is None.
    """

    name = "scripted 1"

    def __init__(self) -> None:
        self.version = -1
        self.rows: dict[str, tuple[int, list[int]]] = {}
        self.steps: threading.Semaphore | None = None
        self.log: list[str] = []
        self.threads: set[int] = set()
        self.seeds: dict[str, int | None] = {}
        self.temperatures: dict[str, float | None] = {}
        self.adapters: dict[str, str] = {}
        self.steps_at_canary: threading.Semaphore | None = None
        self.canary_shift = 0.0
        self.break_step = ""
        self.break_stage = ""
        self.break_swap = ""
        self.break_proof = ""
        self.proof_gate = threading.Event()
        self.proof_gate.set()
        self.stage_gate = threading.Event()
        self.stage_gate.set()
        self.staging_thread = 0
        self.staged = (-1, 0.0)
        self.closed = False

    def submit(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        seed: int | None,
        temperature: float | None = None,
        adapter: str = "",
    ) -> None:
        self.adapters[request_id] = adapter
        self.threads.add(threading.get_ident())
        self.temperatures[request_id] = temperature
        if prompt_ids[0] > 90:
            raise UserError("too long")
        self.seeds[request_id] = seed
        self.rows[request_id] = (prompt_ids[0] + int(request_id.rpartition("/")[2]), [])

    def step(self) -> list[tuple[str, Completion]]:
        self.threads.add(threading.get_ident())
        if self.steps is not None and not self.steps.acquire(timeout=0.002):
            return []
        if self.break_step:
            raise RuntimeError(self.break_step)
        self.log.append("step")
        for _, versions in self.rows.values():
            versions.append(self.version)
        ended = [i for i, (length, versions) in self.rows.items() if len(versions) >= length]
        return [(i, completion(self.rows.pop(i)[1])) for i in ended]

    def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self.rows.pop(request_id, None)

    @property
    def unfinished(self) -> int:
        return len(self.rows)

    def stage(self, tensors: Iterable[tuple[str, Any]], version: int) -> None:
        self.staging_thread = threading.get_ident()
        self.log.append(f"stage {version}")
        assert self.stage_gate.wait(WAIT_S)
        if self.break_stage:
            raise Retryable(self.break_stage)
        given = dict(tensors)
        if set(given) != {"w"}:
            raise WeightMismatch("does not fit the model")
        self.staged = (version, float(given["w"][0]))

    def swap(self, version: int) -> None:
        self.threads.add(threading.get_ident())
        if self.break_swap:
            raise RuntimeError(self.break_swap)
        assert self.staged[0] == version
        self.version = version
        self.log.append(f"swap {version} {self.staged[1]}")

    def prove(self) -> None:
        assert threading.get_ident() not in self.threads  # generation goes on meanwhile
        assert self.proof_gate.wait(WAIT_S)
        if self.break_proof:
            raise WeightMismatch(self.break_proof)

    def sequence_logprobs(self, token_ids: Sequence[int], adapter: str = "") -> list[float]:
        self.log.append(f"canary {adapter}".strip())
        if self.steps_at_canary is not None:
            self.steps_at_canary.release()
        return [-1.0 + self.canary_shift] * (len(token_ids) - 1)

    def close(self) -> None:
        self.closed = True


def completion(versions: list[int]) -> Completion:
    spans: list[VersionSpan] = []
    for place, version in enumerate(versions):
        if spans and spans[-1].version == version:
            spans[-1] = dataclasses.replace(spans[-1], end=place + 1)
        else:
            spans.append(VersionSpan(version=version, start=place, end=place + 1))
    return Completion(
        token_ids=tuple(range(len(versions))),
        logprobs=tuple(-version / 8 for version in versions),
        versions=tuple(spans),
        finish_reason="stop",
    )


class Lengths:
    """Scores with the number of tokens; what it should raise instead can be set."""

    version = "lengths-1"

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.problem: Exception | None = None
        self.unrated = ""  # id of a prompt
        self.leave_out = 0
        self.leave_out_times = 1000

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        assert self.gate.wait(WAIT_S)
        self.calls.append(len(rollouts))
        if self.problem is not None:
            raise self.problem
        if any(rollout.prompt.id == self.unrated for rollout in rollouts):
            raise Unrated("the judge gave no usable answer about sample 1")
        scored = [
            Score(value=float(len(r.completion.token_ids)), scorer_version=self.version)
            for r in rollouts
        ]
        self.leave_out_times -= 1
        return scored[self.leave_out if self.leave_out_times >= 0 else 0 :]


class Shelf:
    """A receiver of what the test puts there."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.fetched = 0

    def fetch(self, manifest: WeightManifest, timeout_s: float) -> Iterator[dict[str, np.ndarray]]:
        self.fetched += 1
        yield self.arrays

    def put(self, version: int, name: str = "w") -> WeightManifest:
        self.arrays = {name: np.full(3, version, np.float32)}
        canary = Canary(token_ids=(1, 2, 3), logprobs=(-1.0, -1.0), tolerance=1e-3)
        with Update(version, "shelf", Nowhere()) as update:
            update.add(self.arrays, {name: "float32"})
            return update.close(canary)


class Words:
    """Decodes to the numbers themselves; notes how many answers came and on which thread."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, answers: Sequence[Sequence[int]]) -> list[str]:
        self.calls.append((len(answers), threading.get_ident()))
        return [" ".join(map(str, ids)) for ids in answers]


@dataclasses.dataclass
class Bench:
    engine: ScriptedEngine
    scorer: Lengths
    shelf: Shelf
    decoder: Words
    worker: RolloutWorker

    def load(self, version: int) -> None:
        self.worker.load_weights(self.shelf.put(version))

    def harvest_all(self, count: int) -> tuple[list[GroupMeta], list[Any]]:
        metas: list[GroupMeta] = []
        groups: list[Any] = []
        deadline = time.monotonic() + WAIT_S
        while len(metas) < count:
            assert time.monotonic() < deadline, f"only {metas}"
            harvest = self.worker.harvest(0.5)
            metas += harvest.groups
            groups += from_table(harvest.payload) if harvest.payload is not None else []
        return metas, groups

    def steps(self, count: int) -> None:
        """Let exactly ``count`` steps happen."""
        assert self.engine.steps is not None
        want = self.engine.log.count("step") + count
        for _ in range(count):
            self.engine.steps.release()
        wait_until(lambda: self.engine.log.count("step") == want)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def make_bench(**settings: Any) -> Bench:
    engine, scorer, shelf = ScriptedEngine(), Lengths(), Shelf()
    chosen = WorkerSettings(**{"name": "w0", "incarnation": 2, **settings})
    decoder = Words()
    worker = RolloutWorker(lambda: engine, decoder, shelf, lambda: scorer, chosen)
    worker.start()
    return Bench(engine, scorer, shelf, decoder, worker)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = make_bench()
    yield made
    made.worker.stop()


def prompt(first: int) -> Prompt:
    message = {"role": "text", "content": "x"}
    return Prompt(id=f"p{first}", messages=(message,), token_ids=(first, 1), metadata={"n": first})


def work(group: int, first: int = 2, samples: int = 2, attempt: int = 0) -> Assignment:
    return Assignment(group_id=group, prompt=prompt(first), samples=samples, attempt=attempt)


def test_a_group_comes_back_whole_scored_and_in_order(bench: Bench) -> None:
    bench.load(0)
    bench.worker.submit([work(5, first=3, samples=3), work(6, first=1)])
    metas, groups = bench.harvest_all(2)
    by_id = {meta.group_id: meta for meta in metas}
    assert by_id[5] == GroupMeta(
        group_id=5, attempt=0, samples=3, prompt_tokens=2, response_tokens=3 + 4 + 5,
        version_min=0, version_max=0,
    )  # fmt: skip
    (five,) = [group for group in groups if group.group_id == 5]
    assert [rollout.sample_index for rollout, _ in five.samples] == [0, 1, 2]
    assert [score.value for _, score in five.samples] == [3.0, 4.0, 5.0]
    assert [rollout.text for rollout, _ in five.samples] == ["0 1 2", "0 1 2 3", "0 1 2 3 4"]
    assert five.samples[0][0].prompt.metadata == {"n": 3}


def test_finished_samples_of_open_groups_are_counted_and_end_a_harvest() -> None:
    made = make_bench(worth_telling=2)
    made.engine.steps = threading.Semaphore(0)
    made.load(0)
    # Their samples take three, four and five steps.
    made.worker.submit([work(0, first=3, samples=3)])
    assert made.worker.harvest(0.01).stats["sampled"] == 0
    made.steps(4)
    harvest = made.worker.harvest(
        WAIT_S
    )  # not after its time is over: two samples are worth a word
    assert harvest.groups == ()
    assert harvest.stats["sampled"] == 2
    assert made.worker.harvest(0.01).stats["sampled"] == 2
    made.steps(1)
    metas, _ = made.harvest_all(1)
    assert metas[0].group_id == 0
    assert made.worker.harvest(0.01).stats["sampled"] == 0
    made.worker.stop()


def test_one_thread_touches_the_engine(bench: Bench) -> None:
    bench.load(0)
    bench.worker.submit([work(n) for n in range(20)])
    bench.load(1)
    bench.harvest_all(20)
    assert len(bench.engine.threads) == 1
    assert threading.get_ident() not in bench.engine.threads


def test_versions_are_exact_across_swaps_between_two_steps(bench: Bench) -> None:
    bench.engine.steps = threading.Semaphore(0)
    bench.load(0)
    bench.worker.submit([work(0, first=6, samples=1)])
    bench.steps(2)
    bench.load(1)
    bench.steps(3)
    bench.load(4)
    bench.steps(1)
    (meta,), (group,) = bench.harvest_all(1)
    assert group.samples[0][0].completion.versions == (
        VersionSpan(version=0, start=0, end=2),
        VersionSpan(version=1, start=2, end=5),
        VersionSpan(version=4, start=5, end=6),
    )
    assert (meta.version_min, meta.version_max) == (0, 4)
    assert bench.engine.log == [
        "stage 0", "swap 0 0.0", "canary", "step", "step", "stage 1", "swap 1 1.0", "canary",
        "step", "step", "step", "stage 4", "swap 4 4.0", "canary", "step",
    ]  # fmt: skip


def test_a_swap_reports_and_is_counted(bench: Bench) -> None:
    bench.engine.canary_shift = 5e-4
    report = bench.worker.load_weights(bench.shelf.put(0))
    assert report.version == 0
    assert report.canary_logp_diff == pytest.approx(5e-4)
    assert min(report.fetch_s, report.verify_s, report.stage_s, report.pause_s) >= 0
    assert bench.worker.stats()["swaps"] == 1


@pytest.mark.parametrize("again", [3, 2])
def test_duplicate_and_late_updates_are_refused_untouched(bench: Bench, again: int) -> None:
    bench.load(3)
    with pytest.raises(WeightMismatch, match="version 3 is in force"):
        bench.load(again)
    assert bench.engine.log == ["stage 3", "swap 3 3.0", "canary"]
    bench.worker.submit([work(0)])
    bench.harvest_all(1)


def test_a_torn_update_is_refused_untouched_and_can_be_sent_again(bench: Bench) -> None:
    bench.load(0)
    good = bench.shelf.put(1)
    bench.shelf.arrays = {"w": np.array([1, 1, 7], np.float32)}
    with pytest.raises(WeightMismatch, match="checksum"):
        bench.worker.load_weights(good)
    bench.worker.submit([work(0)])
    (meta,), _ = bench.harvest_all(1)
    assert meta.version_max == 0
    bench.load(1)
    assert bench.engine.version == 1


def test_staging_runs_beside_the_steps_on_the_caller_s_thread(bench: Bench) -> None:
    bench.load(0)
    bench.engine.steps = threading.Semaphore(0)
    bench.worker.submit([work(0, first=6, samples=1)])
    bench.steps(1)
    bench.engine.stage_gate.clear()
    loading = threading.Thread(target=bench.load, args=(1,))
    loading.start()
    wait_until(lambda: "stage 1" in bench.engine.log)
    bench.steps(3)  # would not happen were staging between two steps
    bench.engine.stage_gate.set()
    loading.join(WAIT_S)
    bench.steps(2)
    _, (group,) = bench.harvest_all(1)
    assert group.samples[0][0].completion.versions == (
        VersionSpan(version=0, start=0, end=4),
        VersionSpan(version=1, start=4, end=6),
    )
    assert bench.engine.staging_thread == loading.ident
    assert bench.engine.staging_thread not in bench.engine.threads


def test_a_failure_in_staging_leaves_the_old_weights_in_force(bench: Bench) -> None:
    bench.load(0)
    bench.engine.break_stage = "no memory; version 0 stays in force"
    with pytest.raises(Retryable, match="version 0 stays in force"):
        bench.load(1)
    bench.worker.submit([work(0)])
    (meta,), _ = bench.harvest_all(1)
    assert meta.version_max == 0
    bench.engine.break_stage = ""
    bench.load(1)
    assert bench.engine.version == 1


def test_a_failure_in_the_swap_makes_the_worker_unfit(bench: Bench) -> None:
    bench.load(0)
    bench.engine.break_swap = "half-way"
    with pytest.raises(EngineFailure, match="half-way"):
        bench.load(1)
    with pytest.raises(EngineFailure, match="half-way"):
        bench.worker.harvest(WAIT_S)


def test_nothing_leaves_the_worker_between_a_swap_and_its_proof(bench: Bench) -> None:
    bench.load(0)
    bench.engine.proof_gate.clear()
    loading = threading.Thread(target=bench.load, args=(1,))
    loading.start()
    wait_until(lambda: bench.engine.version == 1)
    bench.worker.submit([work(0)])
    wait_until(lambda: bool(bench.worker._finished))
    assert bench.worker.harvest(0.05).groups == ()
    bench.engine.proof_gate.set()
    loading.join(WAIT_S)
    (meta,), _ = bench.harvest_all(1)
    assert (meta.version_min, meta.version_max) == (1, 1)


def test_a_failed_proof_makes_the_worker_unfit_and_nothing_leaves_it(bench: Bench) -> None:
    bench.load(0)
    bench.engine.proof_gate.clear()
    bench.engine.break_proof = "3 tensors are not of that version"
    caught: list[BaseException] = []

    def load() -> None:
        try:
            bench.load(1)
        except WeightMismatch as problem:
            caught.append(problem)

    loading = threading.Thread(target=load)
    loading.start()
    wait_until(lambda: bench.engine.version == 1)
    bench.worker.submit([work(0)])
    wait_until(lambda: bool(bench.worker._finished))
    bench.engine.proof_gate.set()
    loading.join(WAIT_S)
    assert "3 tensors" in str(caught[0])
    with pytest.raises(WeightMismatch, match="3 tensors"):
        bench.worker.harvest(0.2)
    with pytest.raises(WeightMismatch, match="3 tensors"):
        bench.worker.submit([work(1)])


def test_an_update_for_another_model_is_refused_untouched(bench: Bench) -> None:
    bench.load(0)
    with pytest.raises(WeightMismatch, match="does not fit"):
        bench.worker.load_weights(bench.shelf.put(1, name="other"))
    bench.worker.submit([work(0)])
    (meta,), _ = bench.harvest_all(1)
    assert meta.version_max == 0


@pytest.mark.parametrize(
    ("shift", "kind", "words"),
    [(0.01, WeightMismatch, "differ"), (float("nan"), EngineFailure, "not finite")],
)
def test_a_wrong_canary_makes_the_worker_unfit(
    bench: Bench, shift: float, kind: type[Exception], words: str
) -> None:
    bench.load(0)
    bench.engine.steps = threading.Semaphore(0)
    bench.worker.submit([work(0, first=1, samples=1)])
    bench.engine.steps_at_canary = bench.engine.steps  # the next step is free once it has answered
    bench.engine.canary_shift = shift
    with pytest.raises(kind, match=words) as caught:
        bench.load(1)
    assert isinstance(caught.value, WeightMismatch) == (kind is WeightMismatch)
    with pytest.raises(kind, match=words):
        bench.worker.harvest(0.2)
    with pytest.raises(kind, match=words):
        bench.worker.submit([work(1)])
    assert "step" not in bench.engine.log  # nothing was sampled from it


def test_work_before_weights_is_refused(bench: Bench) -> None:
    with pytest.raises(Fatal, match="before it was given weights"):
        bench.worker.submit([work(0)])


def test_completions_are_kept_through_an_outage_and_scored_once_it_ends(bench: Bench) -> None:
    bench.load(0)
    bench.scorer.problem = RewardFailure("the service is down")
    bench.worker.submit([work(0), work(1)])
    wait_until(lambda: bench.worker.stats()["reward_down_s"] > 0.2)
    generated = bench.worker.stats()["generated_tokens"]
    assert bench.worker.harvest(0.0).groups == ()
    assert bench.worker.stats()["scoring"] == 2
    bench.scorer.problem = None
    metas, groups = bench.harvest_all(2)
    assert [(m.attempt, m.failure) for m in metas] == [(0, None)] * 2
    assert len(groups) == 2
    after = bench.worker.stats()
    assert after["generated_tokens"] == generated  # not sampled again
    assert (after["scoring"], after["reward_down_s"]) == (0, 0)


def test_an_outage_that_is_too_long_ends_the_worker_so_that_the_run_can_be_resumed() -> None:
    bench = make_bench(reward_outage_s=0.3)
    bench.load(0)
    bench.scorer.problem = RewardFailure("the service is down")
    bench.worker.submit([work(0)])
    with pytest.raises(
        Resumable, match=r"for \d+ s \(reward\.outage_s = 0\.3\): the service is down"
    ):
        bench.harvest_all(1)
    bench.worker.stop()


def test_an_unusable_reply_is_asked_for_once_more(bench: Bench) -> None:
    bench.load(0)
    bench.scorer.leave_out, bench.scorer.leave_out_times = 1, 1
    bench.worker.submit([work(0)])
    (meta,), groups = bench.harvest_all(1)
    assert (meta.failure, len(groups)) == (None, 1)


@pytest.mark.parametrize(
    ("problem", "kind"), [(BadReward("nan"), BadReward), (KeyError("bug"), Unexpected)]
)
def test_an_unusable_reward_ends_the_worker(
    bench: Bench, problem: Exception, kind: type[Exception]
) -> None:
    bench.load(0)
    bench.scorer.problem = problem
    bench.worker.submit([work(0)])
    with pytest.raises(kind):
        bench.harvest_all(1)


def test_a_completion_without_a_score_costs_its_group_only(bench: Bench) -> None:
    bench.load(0)
    bench.scorer.unrated = "p3"
    bench.scorer.gate.clear()  # so that groups wait for their scores together
    bench.worker.submit([work(n, first=3 if n == 4 else 2) for n in range(6)])
    threading.Timer(0.5, bench.scorer.gate.set).start()
    metas, groups = bench.harvest_all(6)
    failed = {meta.group_id: (meta.unrated, meta.retryable) for meta in metas if meta.failure}
    assert failed == {4: (True, False)}
    assert sorted(group.group_id for group in groups) == [0, 1, 2, 3, 5]


def test_a_missing_score_is_a_bad_reward(bench: Bench) -> None:
    bench.load(0)
    bench.scorer.leave_out = 1
    bench.worker.submit([work(0)])
    with pytest.raises(BadReward, match="2 rollouts were scored with 1"):
        bench.harvest_all(1)


def test_a_bad_prompt_fails_alone_and_for_good(bench: Bench) -> None:
    bench.load(0)
    bench.worker.submit([work(0, first=91), work(1)])
    metas, groups = bench.harvest_all(2)
    failed = {meta.group_id: (meta.failure, meta.retryable) for meta in metas}
    assert failed == {0: ("too long", False), 1: (None, False)}
    assert [group.group_id for group in groups] == [1]


def test_a_group_that_is_not_finished_in_time_is_aborted_and_the_engine_goes_on() -> None:
    bench = make_bench(request_timeout_s=0.2)
    try:
        bench.load(0)
        bench.engine.steps = threading.Semaphore(0)
        bench.worker.submit([work(0)])
        (meta,), groups = bench.harvest_all(1)
        assert (meta.late, meta.retryable, groups) == (True, False, [])
        expected = "2 of 2 completions were not finished within rollout.request_timeout_s = 0.2 s"
        assert meta.failure == expected
        assert bench.engine.rows == {}
        bench.engine.steps = None
        bench.worker.submit([dataclasses.replace(work(0), attempt=1)])
        (again,), _ = bench.harvest_all(1)
        assert (again.group_id, again.attempt) == (0, 1)
    finally:
        bench.worker.stop()


def test_the_same_work_twice_is_done_once(bench: Bench) -> None:
    bench.load(0)
    bench.engine.steps = threading.Semaphore(0)
    bench.worker.submit([work(0)])
    bench.worker.submit([work(0)])
    bench.steps(3)
    bench.engine.steps = None
    metas, _ = bench.harvest_all(1)
    assert len(metas) == 1
    assert bench.worker.harvest(0.05).groups == ()


def test_waiting_groups_are_scored_together_while_generation_goes_on() -> None:
    bench = make_bench(scoring_threads=1, score_batch=8)
    bench.load(0)
    bench.scorer.gate.clear()
    bench.worker.submit([work(n) for n in range(7)])
    wait_until(lambda: bench.engine.unfinished == 0)
    wait_until(lambda: bench.worker.stats()["generated_tokens"] == 7 * 5)
    bench.scorer.gate.set()
    bench.harvest_all(7)
    assert sum(bench.scorer.calls) == 14
    assert max(bench.scorer.calls) <= 8
    assert len(bench.scorer.calls) <= 4
    # One call of the tokenizer per call of the scorer, and never on the engine's thread.
    assert [count for count, _ in bench.decoder.calls] == bench.scorer.calls
    assert not {thread for _, thread in bench.decoder.calls} & bench.engine.threads
    bench.worker.stop()


def test_a_failed_step_surfaces_with_its_cause(bench: Bench) -> None:
    bench.load(0)
    bench.engine.break_step = "out of memory"
    bench.worker.submit([work(0)])
    with pytest.raises(
        EngineFailure, match="scripted 1 failed in a decode step: RuntimeError: out of"
    ):
        bench.harvest_all(1)


def test_an_engine_that_cannot_be_built_says_why() -> None:
    def broken() -> ScriptedEngine:
        raise UserError("no such model", where="m")

    worker = RolloutWorker(broken, Words(), Shelf(), Lengths, WorkerSettings())
    with pytest.raises(UserError, match="no such model"):
        worker.start()
    worker.stop()


def test_deadlines_hold(bench: Bench) -> None:
    began = time.monotonic()
    harvest = bench.worker.harvest(0.05)
    assert (harvest.worker, harvest.incarnation) == ("w0", 2)
    assert (harvest.groups, harvest.payload) == ((), None)
    assert time.monotonic() - began < 1
    bench.engine.steps = threading.Semaphore(0)
    with pytest.raises(Retryable, match="1 of 1 prompts had no answer within 0 s"):
        bench.worker.sample([prompt(3)], 1, timeout_s=0.1)


def test_a_swap_past_its_deadline_is_retryable_and_ends_the_worker() -> None:
    bench = make_bench(swap_timeout_s=0.05)
    release = threading.Event()
    bench.engine.swap = lambda version: bool(release.wait(WAIT_S))  # type: ignore[method-assign,assignment]
    with pytest.raises(Retryable, match="did not take weights of version 0 within"):
        bench.load(0)
    release.set()
    with pytest.raises(Retryable):
        bench.worker.harvest(0.1)
    bench.worker.stop()


def test_samples_without_scores_come_in_order_and_need_no_weights(bench: Bench) -> None:
    rollouts = bench.worker.sample([prompt(4), prompt(1)], 2, timeout_s=WAIT_S)
    assert [(r.prompt.id, r.sample_index, len(r.completion.token_ids)) for r in rollouts] == [
        ("p4", 0, 4), ("p4", 1, 5), ("p1", 0, 1), ("p1", 1, 2),
    ]  # fmt: skip
    assert bench.scorer.calls == []
    assert bench.worker.harvest(0.05).groups == ()
    with pytest.raises(UserError, match="too long"):
        bench.worker.sample([prompt(95)], 1, timeout_s=WAIT_S)


def test_a_worker_without_a_scorer_makes_no_training_data() -> None:
    engine, shelf = ScriptedEngine(), Shelf()
    worker = RolloutWorker(lambda: engine, Words(), shelf, None, WorkerSettings())
    worker.start()
    worker.load_weights(shelf.put(0))
    with pytest.raises(Fatal, match="no scorer"):
        worker.submit([work(0)])
    worker.stop()


def test_request_seeds_depend_on_the_sample_alone() -> None:
    seeds = []
    for order in ([0, 1], [1, 0]):
        bench = make_bench(request_seed=9)
        bench.load(0)
        for group in order:
            bench.worker.submit([work(group)])
        bench.harvest_all(2)
        seeds.append(sorted(s for s in bench.engine.seeds.values() if s is not None))
        bench.worker.stop()
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 4


def test_the_groups_of_a_call_decode_together_from_the_first_step_on(bench: Bench) -> None:
    """A slow engine must not begin the first group while the others are on their way to it."""
    bench.load(0)
    submit, together = bench.engine.submit, []
    step = bench.engine.step

    def slow_submit(*given: Any) -> None:
        submit(*given)
        time.sleep(0.002)

    def counted_step() -> Any:
        together.append(len(bench.engine.rows))
        return step()

    bench.engine.submit, bench.engine.step = slow_submit, counted_step  # type: ignore[method-assign]
    number = bench.worker._numbers

    class Slow:  # the caller's thread loses the processor between two groups
        def __next__(self) -> int:
            time.sleep(0.01)
            return next(number)

    bench.worker._numbers = Slow()  # type: ignore[assignment]
    bench.worker.submit([work(n) for n in range(6)] + [work(0)])
    bench.harvest_all(6)
    assert together[0] == 12


def test_seeds_of_workers_and_incarnations_differ() -> None:
    seeds = {derive_seed(run, "worker", i, k) for run in (0, 1) for i in range(8) for k in range(4)}
    assert len(seeds) == 64
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_stop_ends_every_thread_and_closes_the_engine() -> None:
    before = threading.active_count()
    bench = make_bench()
    bench.load(0)
    bench.engine.steps = threading.Semaphore(0)
    bench.worker.submit([work(0)])
    bench.worker.stop()
    assert bench.engine.closed
    wait_until(lambda: threading.active_count() == before)


def test_completions_drawn_beside_training_have_their_own_seed_and_temperature(
    bench: Bench,
) -> None:
    draw = Draw(temperature=0.5, seed=7)
    for _ in range(2):
        drawn = bench.worker.sample([prompt(3)], 2, WAIT_S, draw)
        assert [rollout.sample_index for rollout in drawn] == [0, 1]
    seeds = [bench.engine.seeds[name] for name in sorted(bench.engine.seeds)]
    assert seeds[:2] == seeds[2:]  # the same at every step
    assert None not in seeds
    assert len(set(seeds)) == 2
    assert set(bench.engine.temperatures.values()) == {0.5}


def test_what_nobody_waits_for_any_more_is_dropped(bench: Bench) -> None:
    bench.engine.steps = threading.Semaphore(0)  # it never gets on
    with pytest.raises(Retryable, match="had no answer"):
        bench.worker.sample([prompt(3)], 2, timeout_s=0.05)
    deadline = time.monotonic() + WAIT_S
    while bench.engine.unfinished and time.monotonic() < deadline:
        time.sleep(0.005)
    assert bench.engine.unfinished == 0
