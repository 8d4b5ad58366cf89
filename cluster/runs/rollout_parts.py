"""The files below ``rollouts/`` of a run that goes on: which of them are whole."""

from __future__ import annotations

import shutil
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

FOLDER = "rollouts"


@dataclass(frozen=True, slots=True)
class Parts:
    """``torn``: names of files that cannot be read, now ``damaged-NAME``. ``absent``: steps, from
    0, whose rollouts are not there, the torn ones among them."""

    torn: tuple[str, ...]
    absent: tuple[int, ...]

    def line(self) -> str:
        """For a person; "" where all is there."""
        if not self.absent:
            return ""
        torn = f" ({', '.join(self.torn)} cannot be read and was set aside)" if self.torn else ""
        return (
            f"no rollouts on disk of {len(self.absent)} steps before this one, the first is step "
            f"{self.absent[0]}{torn}; training does not need them, accord replay does"
        )


def check_parts(run_dir: Path, before: int, without: Container[int] = ()) -> Parts:
    """Look at the rollouts of the steps ``before`` the one at which the run goes on: a torn file is
    renamed, so that no reader meets it, and what a killed process was writing is removed.
    ``without``: steps that trained on nothing, as the run went back at them.

    Only the end of each file is read, where a torn one differs; `accord replay` reads all.
    """
    folder = run_dir / FOLDER
    for left in folder.glob(".step-*"):
        left.unlink(missing_ok=True)
    torn = [path for path in sorted(folder.glob("step-*.parquet")) if not _readable(path)]
    for path in torn:
        shutil.move(path, path.with_name(f"damaged-{path.name}"))
    absent = (
        step
        for step in range(before)
        if step not in without and not (folder / f"step-{step:06d}.parquet").is_file()
    )
    return Parts(tuple(path.name for path in torn), tuple(absent))


def _readable(path: Path) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return bool(pq.read_metadata(path).num_rows)
    except (pa.ArrowException, OSError, ValueError):
        return False
