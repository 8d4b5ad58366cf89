"""Which steps a resume may train again from their rollouts."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from cluster.assembly.catch_up import steps_entered
from cluster.runs.run import Run


class NoConfig(BaseModel):
    pass


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], None),  # a run of an older release: as far as its rollouts go
        ([{"start": 0}], 0),
        ([{"start": 0}, {"step": 0}, {"step": 1}], 2),
        ([{"start": 0}, {"step": 0}, {"step": 1}, {"start": 1}], 1),  # rolled back
    ],
)
def test_a_step_that_the_ledger_does_not_know_is_not_taken_as_done(
    tmp_path: Path, rows: list[dict[str, int]], expected: int | None
) -> None:
    run = Run.create(str(tmp_path), "r", "train", NoConfig())
    for row in rows:
        run.account(**row)
    assert steps_entered(run) == expected
