from __future__ import annotations

import pytest

from actors.engines.turns import steps_at_once


@pytest.mark.parametrize(
    ("rows", "parameters", "most", "steps"),
    [
        (64, 900_000, 16, 16),
        (64, 5_000_000, 16, 7),
        (64, 19_000_000, 16, 2),
        (64, 500_000_000, 16, 1),
        (64, 900_000, 1, 1),
        (0, 0, 16, 16),
    ],
)
def test_a_turn_is_as_long_as_its_work_allows(
    rows: int, parameters: int, most: int, steps: int
) -> None:
    assert steps_at_once(rows, parameters, most) == steps
