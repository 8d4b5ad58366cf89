"""Where, when and with what a benchmark ran: the head of each file of results."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "vllm", "ray")


def provenance() -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": {"cpu": cpu_model(), "cores": os.cpu_count()},
    }


def commit() -> str:
    """The commit checked out where this file lies. ``ACCORD_COMMIT`` names it for a copy without
    git, or whose files are newer than its last commit."""
    if given := os.environ.get("ACCORD_COMMIT"):
        return given
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True,
            timeout=10, check=False,
        )  # fmt: skip
        found = done.stdout.strip()
    except FileNotFoundError:
        found = ""
    return found or "unknown"


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
