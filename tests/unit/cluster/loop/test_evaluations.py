"""A run that evaluates its policy: real controller and pool, scripted workers, in virtual time.

Every scene ends in an audit of the books, which knows nothing of evaluations.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.contracts.config.evaluation import EvaluationConfig
from cluster.contracts.durable import FileDigest
from cluster.contracts.errors import AccordError, WorkerDied
from cluster.contracts.records import Rollout, RunState
from cluster.loop.evaluations import EvaluationRole, Verdict
from cluster.measure.simulation.loop import VirtualLoop
from cluster.runs.evaluations import Evaluation, EvaluationFiles, best_of, evaluations_of
from tests.pool_world import prompt_of
from tests.run_world import Books, Sampler, Training

Change = Callable[[Sampler], None]


class Judge:
    name, was_reward = "gold", False

    def __init__(self, scores: dict[int, float] | None = None, seconds: float = 0.1) -> None:
        self.scores, self.seconds = scores or {}, seconds
        self.problem: Exception | None = None
        self.judged: list[int] = []

    async def judge(self, step: int, rollouts: Sequence[Rollout]) -> Verdict:
        await asyncio.sleep(self.seconds)
        if self.problem is not None:
            raise self.problem
        self.judged.append(step)
        score = self.scores.get(step, float(step))
        return Verdict(score=score, win_rate=0.5 + step / 100 if step else None)


class RunBooks(Books):
    """Keeps checkpoints as folders, all but what a run deletes."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.run_dir = run_dir
        self.kept: list[int] = []  # how many are to be kept, at each commit

    async def commit_checkpoint(
        self, staging: Path, files: Sequence[FileDigest], state: RunState, keep: int
    ) -> Path:
        path = self.run_dir / "checkpoints" / f"step-{state.step:06d}"
        path.mkdir(parents=True, exist_ok=True)
        self.kept.append(keep)
        return await super().commit_checkpoint(path, files, state, keep)


def role(run_dir: Path, judge: Judge, **config: Any) -> EvaluationRole:
    usual: dict[str, Any] = {"every": 4, "prompts": "held_out.jsonl", "timeout_s": 60}
    return EvaluationRole(
        config=EvaluationConfig(**{**usual, **config}),
        prompts=[prompt_of(at) for at in range(1000, 1006)],
        judge=judge,
        files=EvaluationFiles(run_dir),
        seed=3,
    )


def evaluated(
    run_dir: Path,
    judge: Judge,
    *,
    bound: int = 2,
    steps: int = 12,
    books: RunBooks | None = None,
    change: Change = lambda _: None,
    scene: Callable[[Training], Any] | None = None,
    killed: bool = False,
    checkpoint_every: int = 50,
    **config: Any,
) -> Training:
    """A run to its end, or until ``scene`` is over where it is ``killed`` then."""
    run_dir.mkdir(exist_ok=True)
    loop = VirtualLoop()

    async def whole() -> Training:
        training = Training(
            loop, books or RunBooks(run_dir), change, steps=steps, workers=2, bound=bound,
            checkpoint_every=checkpoint_every, evaluation=role(run_dir, judge, **config),
        )  # fmt: skip
        try:
            if scene is not None:
                await scene(training)
            if not killed:
                await asyncio.wait_for(training.running, 10_000)
        finally:
            await training.end()
        audit = training.audit()
        assert audit.violations == []
        if not killed and training.controller.stopped_early is None:
            assert audit.in_flight == 0
        return training

    return loop.run(whole())


def steps_of(run_dir: Path) -> list[int]:
    return [row.step for row in evaluations_of(run_dir)]


@pytest.mark.parametrize("bound", [0, 2])
def test_start_every_and_the_last_step_are_evaluated(tmp_path: Path, bound: int) -> None:
    judge = Judge()
    training = evaluated(tmp_path, judge, bound=bound, steps=10)
    rows = evaluations_of(tmp_path)
    assert [row.step for row in rows] == judge.judged == [0, 4, 8, 10]
    assert all(row.version_min >= row.step for row in rows if row.version_min is not None)
    if bound == 0:  # alone in the engines: of this very step
        assert all(row.version_min == row.version_max == row.step for row in rows)
    assert [row.best for row in rows] == [False, True, True, True]
    found = best_of(tmp_path)
    assert found is not None
    assert (found.step, found.checkpoint) == (10, "checkpoints/step-000010")
    assert training.learner.trained == list(range(30))
    told = training.books.of("evaluated")
    assert [event["step"] for event in told] == [0, 4, 8, 10]


def test_with_bound_0_it_has_the_engines_and_their_weights_for_itself(tmp_path: Path) -> None:
    def slow(worker: Sampler) -> None:
        worker.sample_s = 8.0  # of a step that takes two

    training = evaluated(tmp_path, Judge(), bound=0, change=slow)
    rows = evaluations_of(tmp_path)
    assert [row.step for row in rows] == [0, 4, 8, 12]
    assert all(row.version_min == row.version_max == row.step for row in rows)
    assert [worker.beside_groups for worker in training.workers.values()] == [0, 0]
    beside = evaluated(tmp_path / "beside", Judge(), bound=2, change=slow)  # the check can fail
    assert max(worker.beside_groups for worker in beside.workers.values()) > 0


def test_a_step_waits_for_the_copy_of_the_state_that_an_evaluation_needs(tmp_path: Path) -> None:
    async def scene(training: Training) -> None:
        store = training.learner.store

        async def slow(directory: str) -> tuple[FileDigest, ...]:
            await asyncio.sleep(20.0)
            return await store(directory)

        training.learner.store = slow  # type: ignore[method-assign]

    # When step 4 ends, the checkpoint of step 3 is still being written.
    training = evaluated(tmp_path, Judge(), checkpoint_every=3, steps=8, scene=scene)
    assert {4, 8} <= {event["step"] for event in training.books.of("checkpoint")}
    assert [row.best for row in evaluations_of(tmp_path)] == [False, True, True]


def test_numbers_reach_the_metrics_once(tmp_path: Path) -> None:
    written: list[dict[str, float]] = []

    class Noting(RunBooks):
        def write(self, step: int, numbers: Any) -> None:
            written.append(dict(numbers))

    evaluated(tmp_path, Judge(), books=Noting(tmp_path))
    found = [row["evaluation/step"] for row in written if "evaluation/score" in row]
    assert found == [0, 4, 8]


def test_the_first_step_waits_for_the_start(tmp_path: Path) -> None:
    async def scene(training: Training) -> None:
        await asyncio.sleep(200)
        assert training.controller.step == 0

    training = evaluated(tmp_path, Judge(seconds=300.0), scene=scene, timeout_s=600)
    assert evaluations_of(tmp_path)[0].version_max == 0
    assert training.controller.step == 12


@pytest.mark.parametrize("bound", [0, 2])
def test_a_worker_lost_in_the_middle_of_one_costs_a_repeat(tmp_path: Path, bound: int) -> None:
    def slow(worker: Sampler) -> None:
        worker.sample_s = 8.0

    async def scene(training: Training) -> None:
        while (0, 0) not in training.workers or not training.workers[0, 0].sampled:
            await asyncio.sleep(0.1)
        training.workers[0, 0].lost = WorkerDied("killed")

    evaluated(tmp_path, Judge(), bound=bound, change=slow, scene=scene)
    rows = evaluations_of(tmp_path)
    assert (rows[0].step, rows[-1].step) == (0, 12)
    assert [row.repeated for row in rows] == [1] + [0] * (len(rows) - 1)
    assert all(row.completions == 6 and row.problem is None for row in rows)


@pytest.mark.parametrize("bound", [0, 2])
def test_one_that_cannot_be_had_leaves_a_row_and_training_goes_on(
    tmp_path: Path, bound: int
) -> None:
    judge = Judge()
    judge.problem = AccordError("the judge is down")
    training = evaluated(tmp_path, judge, bound=bound)
    rows = evaluations_of(tmp_path)
    assert [(row.step, row.score, row.problem) for row in rows] == [
        (step, None, "the judge is down") for step in (0, 4, 8, 12)
    ]
    assert training.controller.step == 12
    assert best_of(tmp_path) is None


def test_a_judge_that_hangs_costs_its_deadline(tmp_path: Path) -> None:
    evaluated(tmp_path, Judge(seconds=1e6), bound=0, start=False)
    rows = evaluations_of(tmp_path)
    assert rows[0].problem == "the judge gave no scores within 60 s"
    assert rows[-1].step == 12


def test_of_slow_evaluations_each_is_of_the_step_that_was_newest(tmp_path: Path) -> None:
    evaluated(tmp_path, Judge(seconds=30.0), steps=40, start=False)
    steps = steps_of(tmp_path)
    assert steps[0] == 4
    assert steps[-1] == 40
    assert len(steps) < 10
    assert all(later // 4 > earlier // 4 for earlier, later in itertools.pairwise(steps))


def test_the_best_is_kept_and_named(tmp_path: Path) -> None:
    scores = {4: 1.0, 8: 3.0, 12: 2.0, 16: 3.2}
    training = evaluated(tmp_path, Judge(scores), steps=16, min_improvement=0.5)
    assert [row.best for row in evaluations_of(tmp_path)] == [False, True, True, False, False]
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "step": 8, "checkpoint": "checkpoints/step-000008", "score": 3.0,
    }  # fmt: skip
    books = training.books
    assert isinstance(books, RunBooks)
    assert min(books.kept) > 1000  # nothing is deleted while it is not known which is the best
    assert {e["step"] for e in books.of("checkpoint")} == {4, 8, 12, 16}


def test_patience_ends_the_run(tmp_path: Path) -> None:
    scores = {4: 1.0, 8: 3.0, 12: 2.0, 16: 3.0, 20: 9.0}
    training = evaluated(tmp_path, Judge(scores), steps=40, patience=2)
    assert steps_of(tmp_path) == [0, 4, 8, 12, 16]
    (event,) = training.books.of("early_stop")
    assert event["best_step"] == 8
    assert "2 evaluations in a row were no better than that of step 8" in event["reason"]
    assert training.controller.stopped_early == event["reason"]
    assert 16 <= training.controller.step < 20


def test_the_win_rate_can_choose_the_best(tmp_path: Path) -> None:
    falling = {step: -float(step) for step in range(13)}
    evaluated(tmp_path, Judge(falling), metric="win_rate")
    assert [row.best for row in evaluations_of(tmp_path)] == [False, True, True, True]
    found = best_of(tmp_path)
    assert found is not None
    assert found.score == pytest.approx(0.62)


@pytest.mark.parametrize("bound", [0, 2])
def test_a_resumed_run_evaluates_nothing_twice_and_misses_nothing(
    tmp_path: Path, bound: int
) -> None:
    judge, books = Judge({4: 5.0, 8: 1.0, 12: 2.0}), RunBooks(tmp_path)

    async def until_first(training: Training) -> None:
        while len(evaluations_of(tmp_path)) < 2:  # the start, and step 4
            await asyncio.sleep(0.1)

    evaluated(tmp_path, judge, bound=bound, books=books, scene=until_first, killed=True)
    assert books.state is not None
    evaluated(tmp_path, judge, bound=bound, books=books, patience=3)
    assert steps_of(tmp_path) == judge.judged == [0, 4, 8, 12]
    assert [row.best for row in evaluations_of(tmp_path)] == [False, True, False, False]


def test_one_lost_with_the_command_is_made_up_for_where_the_run_goes_on(tmp_path: Path) -> None:
    judge, books = Judge(seconds=50.0), RunBooks(tmp_path)

    async def until_judged(training: Training) -> None:
        while not evaluations_of(tmp_path):
            await asyncio.sleep(0.1)
        while training.controller.step < 6:
            await asyncio.sleep(0.1)

    evaluated(tmp_path, judge, books=books, scene=until_judged, killed=True)
    assert steps_of(tmp_path) == [0]  # that of step 4 was under way
    books.state = RunState(step=6, version=6, next_group=18, prompts_total=10_000)
    judge.seconds = 0.1
    evaluated(tmp_path, judge, books=books)
    assert steps_of(tmp_path) == [0, 6, 8, 12]
    best = best_of(tmp_path)
    assert best is not None
    assert best.step == 12


def test_the_last_step_is_evaluated_also_where_nothing_else_is_left_to_do(tmp_path: Path) -> None:
    judge, books = Judge(seconds=50.0), RunBooks(tmp_path)

    async def until_trained(training: Training) -> None:
        while not training.books.of("checkpoint") or training.controller.step < 4:
            await asyncio.sleep(0.1)

    evaluated(tmp_path, judge, steps=4, books=books, scene=until_trained, killed=True)
    assert books.state is not None
    assert books.state.step == 4
    assert steps_of(tmp_path) == [0]
    evaluated(tmp_path, judge, steps=4, books=books)
    assert steps_of(tmp_path) == [0, 4]


def test_rows_of_steps_that_are_done_anew_are_forgotten(tmp_path: Path) -> None:
    files = EvaluationFiles(tmp_path)
    for step, score in ((4, 1.0), (8, 2.0)):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
        files.add(
            Evaluation(step=step, judge="gold", judge_was_reward=False, score=score, best=True)
        )
        assert files.name_best(step, score)
    assert [row.step for row in files.rows_until(5)] == steps_of(tmp_path) == [4]
    best = best_of(tmp_path)
    assert best is not None
    assert best.step == 4


def test_a_new_learner_does_not_wait_for_what_its_predecessor_was_to_save(tmp_path: Path) -> None:
    """The checkpoint of the step is lost with the learner, and the run has gone on: no best."""
    from cluster.contracts.errors import LearnerLost

    async def scene(training: Training) -> None:
        store, lost = training.learner.store, asyncio.Event()

        async def dies(directory: str) -> tuple[FileDigest, ...]:
            if not lost.is_set() and training.controller.step >= 4:
                while training.controller.step < 5:
                    await asyncio.sleep(0.1)
                lost.set()
                raise LearnerLost("killed")
            return await store(directory)

        async def start(step: int | None = None) -> Any:
            from cluster.measure.simulation.roles import manifest

            training.learner.version = step or 0
            return manifest(training.learner.version)

        training.learner.store = dies  # type: ignore[method-assign]
        training.learner.start = start  # type: ignore[method-assign]

    evaluated(tmp_path, Judge(), scene=scene)
    rows = {row.step: row for row in evaluations_of(tmp_path)}
    assert list(rows) == [0, 4, 8, 12]
    assert not rows[4].best
    assert rows[8].best
