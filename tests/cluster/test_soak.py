"""A minute of random faults; `make soak` takes longer."""

from __future__ import annotations

import pytest
from soak import soak

pytestmark = [pytest.mark.lab, pytest.mark.long]


def test_a_run_survives_random_faults_and_every_prompt_is_accounted_for() -> None:
    totals = soak(seconds=60, seed=1)
    assert sum(fault["hit"] for fault in totals["faults"].values()) >= 3
    assert totals["events"]["worker_lost"] >= 1
    assert totals["violations"] == []
    assert totals["groups"]["trained"] > 0
