"""Every mistake a user can make ends with exit code 2 and one message that says what, where and how
to mend it; no traceback, no half-made run, no process left. What can be known before Ray starts is
said before Ray starts.

The mistakes are in bad_input_cases.py. Each command runs in this process, where each costs a second
and not five; a few run as a user runs them.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.bad_input_cases import CASES, TAKEN, Case

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


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str
    seconds: float


def run_here(words: list[Any], folder: Path) -> Outcome:
    """`accord WORDS` in this process, in `folder`."""
    import launch

    out, err = io.StringIO(), io.StringIO()
    argv, handler, place = sys.argv, signal.getsignal(signal.SIGTERM), Path.cwd()
    path = list(sys.path)
    began = time.monotonic()
    try:
        os.chdir(folder)
        sys.argv = ["accord", *map(str, words)]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            launch.main()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.argv, sys.path[:] = argv, path
        os.chdir(place)
        signal.signal(signal.SIGTERM, handler)
    return Outcome(code, out.getvalue(), err.getvalue(), time.monotonic() - began)


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A mistake that is not seen in time must not start a cluster in the tests' process."""
    if "accord" in request.fixturenames:
        return
    import ray

    def started(*args: Any, **options: Any) -> None:
        raise AssertionError("Ray was started before the mistake was seen")

    monkeypatch.setattr(ray, "init", started)


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
    assert all(line.startswith("starting: ") for line in before.splitlines()), err
    assert err.count("accord: error: ") == 1
    assert err.count("\n  fix: ") == 1


def left_behind(folder: Path, before: set[Path]) -> set[str]:
    ignored = {"__pycache__"}
    return {p.name for p in set(folder.rglob("*")) - before if not ignored & set(p.parts)}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_told_before_anything_starts(name: str, world: Any, tmp_path: Path) -> None:
    case = CASES[name]
    words = case.words(world, tmp_path)
    before = set(tmp_path.rglob("*"))
    outcome = run_here(words, tmp_path)
    check_message(case, outcome.code, outcome.out, outcome.err)
    assert outcome.seconds < SECONDS
    assert left_behind(tmp_path, before) <= {"events.jsonl"}  # of a run that was there
    assert tuple(p.name for p in (tmp_path / "runs").glob("*")) == case.keeps


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
    "    return False\n\n"
    "def broken(completions, **columns):\n"
    "    if tried(completions):\n"
    "        return [1.0, 1.0]\n"
)

FUNCTIONS = {
    "raises": (
        "    known = {}\n    return [known['x'] for _ in completions]\n",
        ("reward.py:broken", "KeyError: 'x'", "reward.py:13 `return [known['x']"),
    ),
    "returns too few": (
        "    return [1.0]\n",
        ("reward.py:broken", "returned 1 rewards for "),
    ),
    "returns nan": (
        "    return [float('nan')] * len(completions)\n",
        ("reward.py:broken", "returned nan for ", "one finite number"),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_reward_function_that_fails_ends_the_run(name: str, world: Any, accord: Any) -> None:
    code, says = FUNCTIONS[name]
    (accord.folder / "reward.py").write_text(NOTE + code)
    config = world.train_toml(
        accord.folder / "c.toml", 'type = "function"\npath = "reward.py:broken"'
    )
    command = accord.run("train", config, "--quiet")
    assert time.time() - (accord.folder / "called").stat().st_mtime < 10.0
    check_message(Case(lambda w, d: [], says), 2, command.stdout, command.stderr)
    assert command.process.returncode == 2
    assert command.stderr.startswith("accord: error: ")
    assert command.used_ray
    assert command.left() == []
    assert list((accord.folder / "runs").iterdir()) == []  # nothing had been learnt
