"""Where Ray keeps its files on this machine."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def grafana_folder() -> Path:
    """Where Ray's head has written dashboards for Grafana: the folder that the user chose for it,
    or that of the newest session."""
    chosen = os.environ.get("RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR")
    if chosen:
        return Path(chosen)
    base = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray"
    return base / "session_latest" / "metrics" / "grafana" / "dashboards"
