"""Roles that are lost while a run goes on, which replaces them by itself: the policy's files are
those of a run that lost nothing, byte for byte, and its books are exact."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.same_run import (
    COMMAND_S,
    LEARNER,
    REWARD,
    RULES,
    events,
    exact,
    live,
    policy_files,
    processes,
    repeatable,
    rows,
    run_of,
    steps_done,
)

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1500)]

STEPS = 12
TWO = ("learner.processes=2", "learner.epochs=100", "learner.lr=1e-4")  # steps of seconds
log = logging.getLogger(__name__)
# `ACCORD_TEST_OUTAGE_S=290 pytest …` for one that is nearly as long as reward.outage_s allows.
OUTAGE_S = float(os.environ.get("ACCORD_TEST_OUTAGE_S", "30"))


@pytest.fixture(scope="module")
def undisturbed(
    world: Any, command_lines: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., dict[str, str]]]:
    """Overrides of the config -> the policy's files of a run with them."""
    made: dict[tuple[str, ...], dict[str, str]] = {}
    lines = []

    def files(*overrides: str) -> dict[str, str]:
        if overrides not in made:
            line = command_lines(tmp_path_factory.mktemp("undisturbed"))
            lines.append(line)
            command = line.start("train", repeatable(line, world, steps=STEPS), *overrides)
            assert command.wait(COMMAND_S) == 0, command.stderr
            made[overrides] = policy_files(line, world)
        return made[overrides]

    yield files
    for line in lines:
        line.close()


def test_one_of_two_processes_of_the_learner_is_killed_in_the_middle_of_a_step(
    world: Any, accord: Any, undisturbed: Callable[..., dict[str, str]]
) -> None:
    """First one of them, later the other. A step takes seconds, its generation and the rest of what
    the run does between two steps a part of one."""
    command = accord.start("train", repeatable(accord, world, steps=STEPS), *TWO)
    for losses, rank in enumerate((1, 0)):
        goal = steps_done(accord) + 3
        command.wait_until(lambda goal=goal: steps_done(accord) >= goal, 300, f"step {goal}")
        victim = processes(command, LEARNER)[rank]
        time.sleep(1.0)
        victim.kill()
        command.wait_until(
            lambda n=losses + 1: len(events(accord, "learner_replaced")) == n, 300, "another one"
        )
        lost, replaced = events(accord, "learner_lost")[-1], events(accord, "learner_replaced")[-1]
        log.info("process %d: %s; %s", rank, lost["cause"].splitlines()[0], replaced)
        # Nothing but the step under way: all before were brought back from disk or are done again.
        assert replaced["version"] + len(replaced["again"]) in (lost["step"], lost["step"] + 1)
    assert command.wait(COMMAND_S) == 0, command.stderr
    assert [row["step"] for row in rows(run_of(accord) / "metrics.jsonl")] == [*range(1, STEPS + 1)]
    assert events(accord, "rolled_back") == events(accord, "worker_lost") == []
    assert policy_files(accord, world) == undisturbed(*TWO)
    exact(accord)
    assert command.left() == []


def test_the_learner_and_the_reward_service_are_killed_and_started_again(
    world: Any, accord: Any, undisturbed: Callable[..., dict[str, str]]
) -> None:
    command = accord.start("train", repeatable(accord, world, steps=STEPS))
    kinds = {LEARNER: "learner_replaced", REWARD: "reward_service_restarted"}
    for role in (LEARNER, REWARD, LEARNER):
        goal, before = steps_done(accord) + 2, len(events(accord, kinds[role]))
        command.wait_until(lambda goal=goal: steps_done(accord) >= goal, 300, f"step {goal}")
        processes(command, role)[0].kill()
        command.wait_until(
            lambda kind=kinds[role], n=before: len(events(accord, kind)) > n, 300, kinds[role]
        )
    assert command.wait(COMMAND_S) == 0, command.stderr
    assert events(accord, "rolled_back") == events(accord, "worker_lost") == []
    assert policy_files(accord, world) == undisturbed()
    exact(accord)
    assert command.left() == []


def test_a_reward_service_is_away_for_long_and_nothing_is_sampled_again(
    world: Any, accord: Any, undisturbed: Callable[..., dict[str, str]]
) -> None:
    """One that the run did not start, so that only its owner can bring it back."""
    service = Service(accord)
    try:
        scored_by = (f"reward.address={service.address}", "reward.deadline_s=6")
        command = accord.start("train", repeatable(accord, world, steps=STEPS), *scored_by)
        command.wait_until(lambda: steps_done(accord) >= 3, 300, "step 3")
        service.kill()
        done = steps_done(accord)
        ends = time.monotonic() + OUTAGE_S
        command.wait_until(lambda: time.monotonic() > ends, OUTAGE_S + 60, "the outage's end")
        assert steps_done(accord) <= done + 1  # whose scores were there already
        assert live(accord)["rewards"]["waiting"] > 0
        service.start()
        assert command.wait(COMMAND_S) == 0, command.stderr
    finally:
        service.kill()
    assert events(accord, "worker_lost") == events(accord, "group_dropped") == []
    assert policy_files(accord, world) == undisturbed()
    exact(accord)


class Service:
    """`accord serve-reward` with the source that `repeatable` names, always at one address."""

    def __init__(self, accord: Any) -> None:
        self._accord, self._config = accord, accord.folder / "service.toml"
        self._config.write_text(f"[[reward.sources]]\n{RULES}\n")
        self._command: Any = None
        self.address = ""
        self.start()

    def start(self) -> None:
        port = self.address.rpartition(":")[2] or "0"
        self._command = self._accord.start("serve-reward", self._config, "--port", port)
        self._command.wait_until(lambda: "\n" in self._command.stdout, 120, "the reward service")
        self.address = self._command.stdout.strip()

    def kill(self) -> None:
        if self._command.process.poll() is None:
            self._command.process.kill()
            self._command.wait(30)
