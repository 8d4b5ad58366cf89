"""A run is ended at each crash point, as `kill -9` would, and resumed to its end: the policy's
files are those of a run that nobody disturbed, byte for byte, and its books are exact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.contracts.crash_points import EXIT_CODE, LEARNER, POINTS, VARIABLE
from cluster.runs.audit import audit_run

pytestmark = [pytest.mark.slow, pytest.mark.long]

# Checkpoints are due after steps 2, 4 and 6, the last. The second save is under way or done when
# what is passed once a step is passed for the fifth time.
PASSINGS = dict.fromkeys(POINTS, 5) | {
    "driver.mid_save": 2,
    "driver.before_commit": 2,
    "driver.after_manifest": 2,
    "driver.after_commit": 2,
    "learner.mid_save": 2,
}


def trained(line: Any, world: Any) -> Any:
    """The command that trains as docs/operate.md says in "The same run twice"."""
    config = world.train_toml(
        line.folder / "c.toml",
        'type = "rules"\nmax_words = 5',
        batch="prompts_per_step = 2\nsamples_per_prompt = 2\nsteps = 6",
        rollout='engine = "transformers"\nmax_tokens = 6\nrequest_seeds = true\nworkers = 1',
        staleness="bound = 0",
        learner="lr = 1e-2\ndeterministic = true",
        checkpoint="every = 2",
    )
    return line.start("train", config)


def policy_files(folder: Path) -> dict[str, str]:
    policy = folder / "runs" / "r" / "policy"
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in policy.iterdir()}
    assert "model.safetensors" in files
    return files


@pytest.fixture(scope="module")
def undisturbed(
    world: Any,
    command_lines: Callable[[Path], Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, str]]:
    line = command_lines(tmp_path_factory.mktemp("undisturbed"))
    command = trained(line, world)
    assert command.wait(240) == 0, command.stderr
    yield policy_files(line.folder)
    line.close()


@pytest.mark.parametrize("point", POINTS)
def test_a_run_ended_at_a_crash_point_and_resumed_equals_one_that_was_not(
    world: Any,
    accord: Any,
    undisturbed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    point: str,
) -> None:
    monkeypatch.setenv(VARIABLE, f"{point}:{PASSINGS[point]}")
    command = trained(accord, world)
    code = command.wait(240)
    run = accord.folder / "runs" / "r"
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    monkeypatch.delenv(VARIABLE)
    if point.startswith(LEARNER):
        assert (code, kinds.count("learner_replaced")) == (0, 1), command.stderr
    else:
        assert code == EXIT_CODE, command.stderr
        assert f"{VARIABLE}: ended at {point}" in command.stderr
        resumed = accord.run("train", "--resume", run, timeout_s=240)
        assert resumed.process.returncode == 0, resumed.stderr
    assert policy_files(accord.folder) == undisturbed
    assert audit_run(str(run)).violations == []
