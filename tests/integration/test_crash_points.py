"""A run is ended at each crash point, as `kill -9` would, and resumed: one run, all points after
each other, so that each end has those before it behind it.

With the settings of docs/operate.md, "The same run twice", the weights after every step and the
policy's files are those of a run that nobody disturbed, bit for bit. With workers that run ahead,
each prompt is trained exactly once per epoch. The books are exact in both.

    pytest -m long tests/integration/test_crash_points.py -o log_cli=true --log-cli-level=INFO
"""

from __future__ import annotations

import json
import logging
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster.contracts.crash_points import EXIT_CODE, LEARNER, POINTS, VARIABLE
from cluster.contracts.rollout_table import from_table
from learner.rl.step_record import read_record
from tests.integration.same_run import (
    CHEAP,
    COMMAND_S,
    RULES,
    events,
    exact,
    policy_files,
    repeatable,
    rows,
    run_of,
    steps_done,
)

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(3600)]

log = logging.getLogger(__name__)
STEPS = 52
OF_DRIVER = [point for point in POINTS if not point.startswith(LEARNER)]
# Of a command: it does two to four steps until then. A checkpoint is due after every second step.
PASSINGS = dict.fromkeys(OF_DRIVER, 3) | {
    "driver.mid_save": 1,
    "driver.before_commit": 1,
    "driver.after_manifest": 1,
    "driver.after_commit": 1,
}
EPOCH, PER_STEP = 16, 4  # prompts


class Crashes:
    """A run whose commands are told where to end."""

    def __init__(self, accord: Any, monkeypatch: pytest.MonkeyPatch, *first: object) -> None:
        self._accord, self._monkeypatch, self._words = accord, monkeypatch, first

    @property
    def steps(self) -> int:
        return steps_done(self._accord)

    def go_on(self, steps: int, point: str = "", passing: int = 1) -> None:
        """Until there are ``steps``, or to the end at ``point``: of the command or of a learner, in
        whose place another one must then go on."""
        if point:
            self._monkeypatch.setenv(VARIABLE, f"{point}:{passing}")
        replaced = len(events(self._accord, "learner_replaced"))
        command = self._accord.start("train", *self._words, f"batch.steps={steps}")
        self._monkeypatch.delenv(VARIABLE, raising=False)
        self._words = ("--resume", run_of(self._accord))
        code = command.wait(COMMAND_S)
        resumed = next((e for e in events(self._accord, "resumed")[::-1]), {})
        log.info(
            "%s: code %d, from step %s (%s and %s steps since) to step %d",
            f"{point}:{passing}" if point else "to the end",
            code,
            *(resumed.get(key, 0) for key in ("step", "checkpoint", "trained_again")),
            self.steps,
        )
        if point and not point.startswith(LEARNER):
            assert code == EXIT_CODE, command.stderr
            assert f"{VARIABLE}: ended at {point}" in command.stderr
            return
        assert code == 0, command.stderr
        assert self.steps == steps
        more = len(events(self._accord, "learner_replaced")) - replaced
        assert more == (1 if point else 0), command.stderr


def weights_after_steps(accord: Any) -> list[str]:
    """Digests of what the learner published."""
    files = sorted((run_of(accord) / "rollouts").glob("step-*.parquet"))
    records = [read_record(pq.read_schema(file)) for file in files]
    return [record.after for record in records if record is not None]


def test_a_run_ended_at_every_crash_point_equals_one_that_nobody_disturbed(
    world: Any, accord: Any, command_lines: Any, tmp_path_factory: Any, monkeypatch: Any
) -> None:
    run = Crashes(accord, monkeypatch, repeatable(accord, world))
    for point in OF_DRIVER:
        run.go_on(STEPS, point, PASSINGS[point])
    for point in ("learner.after_optimizer_step", "learner.before_publish"):
        # Steps that the learner trains again count: two at most, as it then has a checkpoint.
        run.go_on(run.steps + 4, point, 4)
    # From here on no step is left when the end comes.
    run.go_on(run.steps + 1, "learner.mid_save")
    done = run.steps + 2
    run.go_on(done, "driver.after_metrics", 2)
    run.go_on(done, "driver.after_commit")
    run.go_on(done)
    run.go_on(STEPS)
    exact(accord)

    line = command_lines(tmp_path_factory.mktemp("undisturbed"))
    try:
        command = line.start("train", repeatable(line, world, steps=STEPS))
        assert command.wait(COMMAND_S) == 0, command.stderr
        weights = weights_after_steps(line)
        assert len(set(weights)) == STEPS  # each step has changed them
        assert weights_after_steps(accord) == weights
        assert policy_files(accord, world) == policy_files(line, world)
    finally:
        line.close()


def test_one_of_two_processes_ends_while_it_writes_its_share_of_a_checkpoint(
    world: Any, accord: Any, monkeypatch: Any
) -> None:
    two = ("learner.processes=2", "learner.sharding=fsdp2")
    run = Crashes(accord, monkeypatch, repeatable(accord, world), *two)
    # Its first checkpoint is whole; of the second one it writes half of its share.
    run.go_on(8, "learner.mid_save@1", 2)
    kinds = [row["kind"] for row in rows(run_of(accord) / "events.jsonl")]
    # The second one came into being only when another learner wrote it.
    assert kinds[: kinds.index("learner_lost")].count("checkpoint") == 1
    assert kinds.count("checkpoint") > 2
    kept = [path.name for path in (run_of(accord) / "checkpoints").iterdir()]
    assert not [name for name in kept if name.startswith((".staging", "damaged"))], kept
    exact(accord)


def test_an_asynchronous_run_ended_at_every_crash_point_trains_each_prompt_once_per_epoch(
    world: Any, accord: Any, monkeypatch: Any
) -> None:
    config = world.train_toml(
        accord.folder / "c.toml",
        RULES,
        batch=f"prompts_per_step = {PER_STEP}\nsamples_per_prompt = 2\nsteps = {STEPS}",
        rollout='engine = "transformers"\nmax_tokens = 6\nworkers = 2',
        staleness="bound = 2",
        checkpoint="every = 2",
        **CHEAP,
    )
    run = Crashes(accord, monkeypatch, config)
    for point in OF_DRIVER:
        run.go_on(STEPS, point, PASSINGS[point])
    run.go_on(STEPS)

    audit = accord.run("audit", run_of(accord), "--json")
    assert audit.process.returncode == 0, audit.stdout + audit.stderr
    books = json.loads(audit.stdout)
    log.info("audit: %s", books)
    assert (books["violations"], books["trained"]) == ([], STEPS * PER_STEP)
    groups = [
        group
        for file in sorted((run_of(accord) / "rollouts").glob("step-*.parquet"))
        for group in from_table(pq.read_table(file))
    ]
    assert [group.group_id for group in groups] == list(range(STEPS * PER_STEP))
    prompts = [group.samples[0][0].prompt.id for group in groups]
    for first in range(0, len(prompts), EPOCH):
        assert len(set(prompts[first : first + EPOCH])) == EPOCH
