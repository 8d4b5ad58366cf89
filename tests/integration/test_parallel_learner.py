"""`accord train` with a learner whose processes split matrices or rows trains what one trains."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.integration.same_run import COMMAND_S, repeatable, rows, run_of

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1500)]

log = logging.getLogger(__name__)

# One plain gradient step: Adam would turn rounding of tiny gradients into whole steps.
PLAIN = ("learner.lr=0.1", "learner.eps=1.0")
MODES = {
    "tensor": ("learner.processes=2", "learner.tensor_parallel=2"),
    "sequence": ("learner.processes=2", "learner.sequence_parallel=2"),
}


@pytest.fixture(scope="module")
def trained(
    world: Any, command_lines: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Overrides -> (weights, metrics of each step) of a run."""

    def run(*overrides: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        line = command_lines(tmp_path_factory.mktemp("run"))
        try:
            command = line.start("train", repeatable(line, world, steps=4), *PLAIN, *overrides)
            assert command.wait(COMMAND_S) == 0, command.stderr
            folder = run_of(line)
            weights = load_file(folder / "policy" / "model.safetensors")
            return weights, rows(folder / "metrics.jsonl")
        finally:
            line.close()

    return run


def test_processes_that_split_matrices_or_rows_train_what_one_trains(
    world: Any, trained: Callable[..., Any]
) -> None:
    start = load_file(world.policy / "model.safetensors")
    wanted, metrics = trained()
    moved = max(float((wanted[name] - start[name]).abs().max()) for name in start)
    assert moved > 1e-4
    for mode, overrides in MODES.items():
        weights, found = trained(*overrides)
        assert weights.keys() == wanted.keys()
        worst = max(float((weights[name] - wanted[name]).abs().max()) for name in wanted)
        log.info("%s: weights differ by %.1e, training moved them by %.1e", mode, worst, moved)
        assert worst < 1e-3 * moved, mode
        losses = [row["policy/loss"] for row in metrics if "policy/loss" in row]
        ours = [row["policy/loss"] for row in found if "policy/loss" in row]
        assert len(losses) == 4
        assert ours == pytest.approx(losses, rel=1e-3, abs=1e-5), mode
