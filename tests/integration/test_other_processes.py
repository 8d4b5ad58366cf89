"""A run begun with four learner processes goes on with two, then with one, and learns what it would
have learnt: its numbers are those of a run with four processes that nobody interrupted.

Sums over another number of processes are rounded in another order, so the bound is not zero.

    pytest -m long tests/integration/test_other_processes.py -o log_cli=true --log-cli-level=INFO
"""

from __future__ import annotations

import logging
from typing import Any

import pytest

from tests.integration.same_run import COMMAND_S, exact, repeatable, rows, run_of

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(3600)]

log = logging.getLogger(__name__)
STEPS = 6
BOUND = 1e-4  # of the larger of both numbers, or of 1
NAMES = ("policy/loss", "policy/grad_norm", "value/loss", "objective/kl", "reward/score")


def on(processes: int) -> tuple[str, str]:
    sharding = "fsdp2" if processes > 1 else "none"
    return f"learner.processes={processes}", f"learner.sharding={sharding}"


def go(line: Any, *words: object) -> str:
    command = line.start("train", *words)
    assert command.wait(COMMAND_S) == 0, command.stderr
    text: str = command.stdout + command.stderr
    return text


def test_four_processes_then_two_then_one(
    world: Any, accord: Any, command_lines: Any, tmp_path_factory: Any
) -> None:
    go(accord, repeatable(accord, world), *on(4), "batch.steps=2")
    for done, processes in ((2, 2), (4, 1)):
        words = ("--resume", run_of(accord), *on(processes), f"batch.steps={done + 2}")
        said = go(accord, *words)
        assert f"resuming at step {done} of {done + 2}, " in said, said
        log.info("%s: %s", words, [line for line in said.splitlines() if "resuming" in line])
    exact(accord)

    line = command_lines(tmp_path_factory.mktemp("undisturbed"))
    try:
        go(line, repeatable(line, world), *on(4), f"batch.steps={STEPS}")
        ours, theirs = (rows(run_of(one) / "metrics.jsonl") for one in (accord, line))
    finally:
        line.close()
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for mine, wanted in zip(ours, theirs, strict=True):
        pairs = {name: (mine[name], wanted[name]) for name in NAMES if name in wanted}
        assert len(pairs) > 2
        log.info("step %d: %s", wanted["step"], pairs)
        for name, (got, number) in pairs.items():
            assert got == pytest.approx(number, rel=BOUND, abs=BOUND), name
