"""Parts of a run that stand still: who waits for what is said with the stacks of all processes, and
then what docs/fault-model.md says happens. The times are those of the config, made short."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.integration.same_run import (
    COMMAND_S,
    LEARNER,
    events,
    exact,
    live,
    processes,
    repeatable,
    run_of,
    steps_done,
)

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1500)]

STALL_S = 15
SLEEPS = """
import os, threading

def score(completions, **columns):
    if os.path.exists({flag!r}):
        threading.Event().wait()
    return [float(len(str(completion)) % 7) for completion in completions]
"""


def told(accord: Any, command: Any, waits_for: str) -> str:
    """What the run has written about its stall, which the console names."""
    command.wait_until(lambda: events(accord, "stalled"), 300, "the stall to be told")
    stalled = events(accord, "stalled")[0]
    assert stalled["waits_for"].startswith(waits_for)
    # The watchdog looks every five seconds, and what it looks at took place shortly before.
    assert STALL_S <= stalled["idle_s"] <= STALL_S + 15
    assert f"nothing has moved for {stalled['idle_s']} s; waiting for {waits_for}" in command.stderr
    assert stalled["file"] in command.stderr
    text = Path(stalled["file"]).read_text(encoding="utf-8")
    assert f"The run waits for {waits_for}" in text
    for name in ("driver", "learner", "worker-0", "reward service 0"):
        assert f"== {name} ==" in text
    return text


def part(text: str, name: str) -> str:
    """The stacks of one process."""
    return text.partition(f"== {name} ==\n")[2].partition("\n== ")[0]


def test_a_reward_function_that_sleeps_for_ever(world: Any, accord: Any) -> None:
    flag = accord.folder / "sleep"
    (accord.folder / "reward.py").write_text(SLEEPS.format(flag=str(flag)))
    config = repeatable(
        accord,
        world,
        steps=30,
        source='type = "function"\npath = "reward.py:score"',
        cluster=f"stall_timeout_s = {STALL_S}",
    )
    command = accord.start("train", config, "reward.deadline_s=5", "reward.outage_s=45")
    command.wait_until(lambda: steps_done(accord) >= 3, 300, "step 3")
    flag.touch()
    text = told(accord, command, "scores of finished completions")
    assert "Its own deadline is reward.outage_s, 45 s" in text
    assert "reward.py" in part(text, "reward service 0")  # where it sleeps
    assert "in score" in part(text, "reward service 0")
    assert command.wait(COMMAND_S) == 75, command.stderr
    assert "rewards could not be had for" in command.stderr
    assert command.left() == []

    flag.unlink()
    resumed = accord.run("train", "--resume", run_of(accord), timeout_s=COMMAND_S)
    assert resumed.process.returncode == 0, resumed.stderr
    exact(accord)


def test_a_stopped_learner(world: Any, accord: Any) -> None:
    config = repeatable(
        accord,
        world,
        steps=30,
        every=100,
        learner="step_timeout_s = 45",
        cluster=f"stall_timeout_s = {STALL_S}",
    )
    command = accord.start("train", config)
    command.wait_until(lambda: steps_done(accord) >= 3, 300, "step 3")
    (stopped,) = processes(command, LEARNER)
    stopped.send_signal(signal.SIGSTOP)
    seen: list[float] = []

    def silent() -> bool:
        learner = live(accord)["learner"]
        if learner["silent"]:
            seen.append(learner["heartbeat_age_s"])
        return bool(seen)

    command.wait_until(silent, 120, "the learner to be shown as silent")
    assert seen[0] <= 15
    text = told(accord, command, "learner step ")
    assert "Its own deadline is learner.step_timeout_s, 45 s" in text
    assert "did not answer within 10 s" in part(text, "learner")
    assert "File" in part(text, "worker-0")
    # Its own deadline has come: another learner goes on, and the run is none the worse for it.
    assert command.wait(COMMAND_S) == 0, command.stderr
    assert len(events(accord, "learner_replaced")) == 1
    assert "waited 45 s for the learner" in events(accord, "learner_lost")[0]["cause"]
    assert not stopped.is_running()
    exact(accord)
    assert command.left() == []
