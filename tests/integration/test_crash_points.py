"""A run is ended at each crash point, as `kill -9` would, and resumed to its end.

With the settings of docs/operate.md, "The same run twice", the policy's files are those of a run
that nobody disturbed, byte for byte. With workers that run ahead, each prompt is trained exactly
once per epoch. The books are exact in both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster.contracts.crash_points import DRIVER, EXIT_CODE, LEARNER, POINTS, VARIABLE
from cluster.contracts.rollout_table import from_table
from tests.integration.same_run import (
    CHEAP,
    COMMAND_S,
    RULES,
    events,
    exact,
    policy_files,
    repeatable,
    run_of,
)

# Each is one or two whole commands, with the start and the end of a Ray cluster.
pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1500)]

# Checkpoints are due after steps 2, 4 and 6, the last. The second save is under way or done when
# what is passed once a step is passed for the fifth time.
PASSINGS = dict.fromkeys(POINTS, 5) | {
    "driver.mid_save": 2,
    "driver.before_commit": 2,
    "driver.after_manifest": 2,
    "driver.after_commit": 2,
    "learner.mid_save": 2,
}
# (point, passing, checkpoint.every). The first below the points is before any checkpoint. The last
# ones leave nothing to train: there is a checkpoint after step 5, and the one of the last step is
# the second in any case.
CRASHES = [
    *((point, passing, 2) for point, passing in PASSINGS.items()),
    ("driver.after_metrics", 3, 5),
    ("driver.after_metrics", 6, 5),
    ("driver.before_commit", 2, 5),
    ("driver.after_commit", 2, 5),
    ("learner.mid_save", 2, 5),
]

EPOCH, EPOCHS = 16, 4  # prompts of the world
PER_STEP = 4
# Workers are up to two steps ahead, so one admission and one broadcast may serve three steps: of 16
# steps there are at least six of each. The first checkpoint is there long before.
PASSINGS_AHEAD = dict.fromkeys(POINTS, 10) | {
    "driver.after_admit": 5,
    "driver.after_broadcast": 5,
    "driver.mid_save": 2,
    "driver.before_commit": 2,
    "driver.after_manifest": 2,
    "driver.after_commit": 2,
}


def trained_ahead(line: Any, world: Any) -> Any:
    config = world.train_toml(
        line.folder / "c.toml",
        RULES,
        batch=f"prompts_per_step = {PER_STEP}\nsamples_per_prompt = 2\n"
        f"steps = {EPOCH * EPOCHS // PER_STEP}",
        rollout='engine = "transformers"\nmax_tokens = 6\nworkers = 2',
        staleness="bound = 2",
        checkpoint="every = 2",
        **CHEAP,
    )
    return line.start("train", config)


def ended_and_resumed(command: Any, accord: Any, point: str) -> None:
    """``command`` ends at the driver's ``point``; another one brings its run to the end."""
    assert command.wait(COMMAND_S) == EXIT_CODE, command.stderr
    assert f"{VARIABLE}: ended at {point}" in command.stderr
    resumed = accord.run("train", "--resume", run_of(accord), timeout_s=COMMAND_S)
    assert resumed.process.returncode == 0, resumed.stderr


@pytest.fixture(scope="module")
def undisturbed(
    world: Any,
    command_lines: Callable[[Path], Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, str]]:
    line = command_lines(tmp_path_factory.mktemp("undisturbed"))
    command = line.start("train", repeatable(line, world))
    assert command.wait(COMMAND_S) == 0, command.stderr
    yield policy_files(line, world)
    line.close()


@pytest.mark.parametrize(("point", "passing", "every"), CRASHES)
def test_a_run_ended_at_a_crash_point_and_resumed_equals_one_that_was_not(
    world: Any,
    accord: Any,
    undisturbed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    point: str,
    passing: int,
    every: int,
) -> None:
    monkeypatch.setenv(VARIABLE, f"{point}:{passing}")
    command = accord.start("train", repeatable(accord, world, every=every))
    monkeypatch.delenv(VARIABLE)
    if point.startswith(LEARNER):
        assert command.wait(COMMAND_S) == 0, command.stderr
        assert len(events(accord, "learner_replaced")) == 1, command.stderr
    else:
        ended_and_resumed(command, accord, point)
    assert policy_files(accord, world) == undisturbed
    exact(accord)


@pytest.mark.parametrize("point", [point for point in POINTS if point.startswith(DRIVER)])
def test_an_asynchronous_run_ended_and_resumed_trains_each_prompt_once_per_epoch(
    world: Any, accord: Any, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    monkeypatch.setenv(VARIABLE, f"{point}:{PASSINGS_AHEAD[point]}")
    command = trained_ahead(accord, world)
    monkeypatch.delenv(VARIABLE)
    ended_and_resumed(command, accord, point)
    run = run_of(accord)
    audit = accord.run("audit", run, "--json")
    assert audit.process.returncode == 0, audit.stdout + audit.stderr
    books = json.loads(audit.stdout)
    assert (books["violations"], books["trained"]) == ([], EPOCH * EPOCHS)
    groups = [
        group
        for file in sorted((run / "rollouts").glob("step-*.parquet"))
        for group in from_table(pq.read_table(file))
    ]
    assert [group.group_id for group in groups] == list(range(EPOCH * EPOCHS))
    prompts = [group.samples[0][0].prompt.id for group in groups]
    for epoch in range(EPOCHS):
        assert len(set(prompts[epoch * EPOCH : (epoch + 1) * EPOCH])) == EPOCH
