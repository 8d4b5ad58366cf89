"""A run that evaluates its policy trains the same weights, byte for byte, as one that does not;
also where the command is killed in the middle of an evaluation, and goes on.

    pytest -m long tests/integration/test_evaluation_while_training.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import write_rows
from tests.integration.same_run import (
    COMMAND_S,
    RULES,
    events,
    exact,
    policy_files,
    repeatable,
    rows,
    run_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1500)]

STEPS = 6
JUDGE = f"[[evaluation.judge.sources]]\n{RULES}"


def evaluated(line: Any, world: Any, engine: str) -> Path:
    texts = [{"prompt": f"how do I clean battery number {number}"} for number in range(12)]
    held_out = write_rows(line.folder / "held_out.jsonl", texts)
    section = f'every = 2\nprompts = "{held_out}"\nsamples = 2\n{JUDGE}'
    return plain(line, world, engine, evaluation=section)


def plain(line: Any, world: Any, engine: str, **sections: str) -> Path:
    file = repeatable(line, world, steps=STEPS, every=50, **sections)
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace('engine = "transformers"', f'engine = "{engine}"'), "utf-8")
    return file


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_the_weights_are_those_of_a_run_without_evaluations(
    world: Any, accord: Any, command_lines: Any, tmp_path_factory: Any, engine: str
) -> None:
    command = accord.start("train", evaluated(accord, world, engine))
    command.wait_until(
        lambda: any(e["step"] == 2 for e in events(accord, "evaluation_began")),
        COMMAND_S,
        "the evaluation of step 2",
    )
    command.process.kill()
    command.wait(COMMAND_S)
    before = [row["step"] for row in rows(run_of(accord) / "evaluations.jsonl")]
    again = accord.start("train", "--resume", run_of(accord))
    assert again.wait(COMMAND_S) == 0, again.stderr
    found = rows(run_of(accord) / "evaluations.jsonl")
    steps = [row["step"] for row in found]
    assert before == [0] or before == [0, 2]
    assert steps[0] == 0
    assert steps[-1] == STEPS
    assert len(steps) == len(set(steps)) == 4  # where it was killed, step 3 may stand for 2
    assert all(row["version_min"] == row["version_max"] == row["step"] for row in found)
    assert all(row["problem"] is None and row["completions"] == 24 for row in found)
    exact(accord)

    line = command_lines(tmp_path_factory.mktemp("without"))
    try:
        alone = line.start("train", plain(line, world, engine))
        assert alone.wait(COMMAND_S) == 0, alone.stderr
        assert policy_files(accord, world) == policy_files(line, world)
    finally:
        line.close()
