"""Which policy a path means."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.contracts.errors import UserError
from cluster.runs.policies import policy_directory


def test_a_run_stands_for_its_policy_or_that_of_its_newest_checkpoint(tmp_path: Path) -> None:
    assert policy_directory("some/hub-id") == "some/hub-id"
    assert policy_directory(str(tmp_path)) == str(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="without a policy"):
        policy_directory(str(tmp_path))
    for step in (10, 999_999, 1_000_000):
        (tmp_path / "checkpoints" / f"step-{step:06d}" / "policy").mkdir(parents=True)
    assert policy_directory(str(tmp_path)).endswith("step-1000000/policy")
    (tmp_path / "policy").mkdir()
    assert policy_directory(str(tmp_path)) == str(tmp_path / "policy")
