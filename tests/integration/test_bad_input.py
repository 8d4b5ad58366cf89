"""Every mistake a user can make ends with exit code 2 and one message that says what, where and how
to mend it; no traceback, no half-made run, no process left. What can be known before Ray starts is
said before Ray starts.

The mistakes are in bad_input_cases.py. Each command runs in this process, where each costs a second
and not five; a few run as a user runs them.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.bad_input_cases import CASES, GOOD_FUNCTION, TAKEN, Case

pytestmark = pytest.mark.slow

SECONDS = 6.0
AS_PROCESSES = (
    "misspelt key in the file",
    "weights cut off",
    "row that is not JSON",
    "reward that raises",
    "import of equal answers",
    "resume of a finished run",
    "unknown option",
)


@pytest.fixture(scope="module", autouse=True)
def taken_port_is_freed() -> Iterator[None]:
    yield
    TAKEN.close()


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """What every command imports, so that the first case is not the slowest."""
    import datasets
    import transformers

    assert datasets
    assert transformers


def check_message(case: Case, code: int, out: str, err: str) -> None:
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    for part in case.says:
        assert part in err, err
    if case.usage:
        return
    before, found, _ = err.partition("accord: error: ")
    assert found, err
    # Only what the start log says of its parts may stand before it.
    assert all(
        re.fullmatch(r"starting: .*|  .*: [\d.]+ s", line) for line in before.splitlines()
    ), err
    assert err.count("accord: error: ") == 1
    assert err.count("\n  fix: ") == 1


def left_behind(folder: Path, before: set[Path]) -> set[str]:
    ignored = {"__pycache__"}
    return {p.name for p in set(folder.rglob("*")) - before if not ignored & set(p.parts)}


@pytest.mark.parallel
@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_told_before_anything_starts(name: str, world: Any, accord_here: Any) -> None:
    case = CASES[name]
    folder = accord_here.folder
    words = case.words(world, folder)
    before = set(folder.rglob("*"))
    outcome = accord_here.run(*words)
    check_message(case, outcome.code, outcome.out, outcome.err)
    assert outcome.seconds < SECONDS
    assert left_behind(folder, before) <= {"events.jsonl"}  # of a run that was there
    assert tuple(p.name for p in (folder / "runs").glob("*")) == case.keeps


@pytest.mark.parametrize("name", AS_PROCESSES)
def test_a_mistake_is_told_by_the_command_as_a_user_runs_it(
    name: str, world: Any, accord: Any
) -> None:
    case = CASES[name]
    began = time.monotonic()
    command = accord.run(*case.words(world, accord.folder))
    seconds = time.monotonic() - began
    check_message(case, command.process.returncode, command.stdout, command.stderr)
    assert not command.used_ray
    assert command.left() == []
    assert seconds < 2 * SECONDS  # other tests may run beside it


# Good when it is tried before the start; then it notes when it was called, so that the way from
# there to the end can be timed.
NOTE = (
    "from pathlib import Path\n\n"
    "def tried(completions):\n"
    "    if completions[0][0]['content'] == 'A trial completion.':\n"
    "        return True\n"
    "    Path(__file__).with_name('called').mkdir(exist_ok=True)\n"
    "    print('I was called')\n"
    "    return False\n\n"
    "def broken(completions, **columns):\n"
    "    if tried(completions):\n"
    "        return [1.0, 1.0]\n"
)

FUNCTIONS = {
    "raises": (
        "    known = {}\n    return [known['x'] for _ in completions]\n",
        ("reward.py:broken", "KeyError: 'x'", "reward.py:14 `return [known['x']", ", line "),
    ),
    "returns nan": (
        "    return [float('nan')] * len(completions)\n",
        ("reward.py:broken", "returned nan for ", "one finite number", "prompts.jsonl, line "),
    ),
}


def train_with(code: str, world: Any, accord: Any, *overrides: str, within_s: float = 10.0) -> Any:
    (accord.folder / "reward.py").write_text(NOTE + code)
    config = world.train_toml(
        accord.folder / "c.toml", 'type = "function"\npath = "reward.py:broken"'
    )
    command = accord.run("train", config, "--quiet", *overrides, timeout_s=240)
    assert time.time() - (accord.folder / "called").stat().st_mtime < within_s
    assert "Traceback" not in command.stderr
    assert "ray::" not in command.stderr
    assert command.used_ray
    assert command.left() == []
    return command


# A raise and an unusable number end a run by the same way: one of them in every run of the tests.
@pytest.mark.parametrize("name", ["raises", pytest.param("returns nan", marks=pytest.mark.long)])
def test_a_reward_function_that_fails_later_ends_the_run_and_leaves_its_log(
    name: str, world: Any, accord: Any
) -> None:
    code, says = FUNCTIONS[name]
    command = train_with(code, world, accord)
    run = accord.folder / "runs" / "r"
    log = run / "logs" / "reward.log"
    assert command.process.returncode == 2
    assert command.stderr.startswith("accord: error: ")
    for part in (*says, f"\n  log: {log}"):
        assert part in command.stderr
    assert json.loads((run / "manifest.json").read_text())["status"] == "failed"
    written = log.read_text()
    assert "I was called" in written
    assert ("Traceback" in written) is (name == "raises")


def test_a_reward_that_kills_its_process_each_time_ends_the_run_as_resumable(
    world: Any, accord: Any
) -> None:
    kills = "    import os\n    os._exit(9)\n"
    command = train_with(
        kills, world, accord, "reward.outage_s=2", "reward.deadline_s=3", within_s=60.0
    )
    assert command.process.returncode == 75
    run = accord.folder / "runs" / "r"
    deaths = (run / "events.jsonl").read_text().count("reward_service_lost")
    said = command.stderr
    away = r"accord: stopped: rewards could not be had for \d+ s \(reward\.outage_s = 2\): "
    assert re.match(away, said)
    died = re.search(r"\n  cause: the reward service's process died (once|\d+ times) within", said)
    assert died is not None, said
    assert 1 <= (1 if died[1] == "once" else int(died[1].split()[0])) <= deaths
    assert "\n  fix: mend the reward that ends its process: os._exit" in said
    assert f"\n  log: {run / 'logs' / 'reward.log'}\n" in said
    assert (
        f"\n  stopped before the first checkpoint; to continue: accord train --resume {run}" in said
    )


def test_a_resource_that_ray_does_not_have_is_named(world: Any, accord: Any) -> None:
    (accord.folder / "good.py").write_text(GOOD_FUNCTION)
    config = world.train_toml(accord.folder / "c.toml", 'type = "function"\npath = "good.py:good"')
    command = accord.run("train", config, "learner.gpus=1", "--quiet")
    assert command.process.returncode == 2, command.stderr
    for part in ("learner.gpus", "asks for 1 GPU (learner.gpus = 1), Ray has 0", "\n  fix: "):
        assert part in command.stderr
    assert command.left() == []
    assert not (accord.folder / "runs").exists()
