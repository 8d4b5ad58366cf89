"""``live.json``: the newest view of a run, for `accord status` and the pages."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.contracts.live import LIVE, LiveView


class LiveFile:
    """Readers see the view before or this one. Only the user may read it: it holds the address of
    the page in Ray's dashboard with its token. Not synced: after a crash it is outdated anyway."""

    def __init__(self, run_path: Path) -> None:
        self._path = run_path / LIVE

    def __call__(self, view: LiveView) -> None:
        staging = self._path.with_name(f".{LIVE}.tmp")
        file = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(file, "w", encoding="utf-8") as out:
            out.write(view.to_json())
        os.replace(staging, self._path)
