from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.runs.rollout_parts import check_parts


def part(run: Path, step: int) -> Path:
    (run / "rollouts").mkdir(exist_ok=True)
    path = run / "rollouts" / f"step-{step:06d}.parquet"
    pq.write_table(pa.table({"group_id": [step]}), path)
    return path


@pytest.mark.parametrize("left", [0, 3, 50, -1])
def test_a_torn_file_is_set_aside_by_name_and_its_absence_told(tmp_path: Path, left: int) -> None:
    whole = [part(tmp_path, step) for step in (0, 1, 3)]
    whole[1].write_bytes(whole[1].read_bytes()[:left])
    writing = tmp_path / "rollouts" / ".step-000004.parquet.writing-7"
    writing.write_bytes(b"half")
    parts = check_parts(tmp_path, 4)
    assert (parts.torn, parts.absent) == (("step-000001.parquet",), (1, 2))
    assert "2 steps before this one, the first is step 1 (step-000001.parquet" in parts.line()
    names = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert names == ["damaged-step-000001.parquet", "step-000000.parquet", "step-000003.parquet"]


def test_a_whole_run_has_nothing_to_tell(tmp_path: Path) -> None:
    for step in range(3):
        part(tmp_path, step)
    assert check_parts(tmp_path, 2).line() == ""
    assert check_parts(tmp_path / "new", 0).line() == ""
