"""The measurement of a sharded learner's memory, at a size at which it says little."""

from __future__ import annotations

import pytest

from benchmarks.sharded_memory import main


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parallel
def test_it_measures_each_process_while_it_loads_and_steps() -> None:
    found = main(["--size", "tiny", "--processes", "2"])
    assert len(found["ranks"]) == 2
    for rank in found["ranks"]:
        assert 0 < rank["loading_mb"] < rank["step_mb"]
        assert rank["parameters"] == 149_056
