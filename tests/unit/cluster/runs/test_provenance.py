"""Versions and the commit: without importing what is heavy, and never another project's commit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cluster.runs.provenance import changed_files, git_commit, versions

ROOT = Path(__file__).resolve().parents[4]


def test_version_names_accord_python_and_the_libraries_at_once() -> None:
    code = (
        "import sys, launch\n"
        "sys.argv = ['accord', '--version']\n"
        "try:\n    launch.main()\n"
        "finally:\n    print(sorted({'torch', 'vllm', 'ray', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    *lines, heavy = done.stdout.splitlines()
    assert (done.returncode, heavy) == (0, "[]"), done.stderr
    assert lines[0].startswith("accord ")
    assert lines[1].startswith("python 3.")
    assert f"torch {versions()['torch']}" in lines
    commit = git_commit()
    assert commit is None or commit[:12] in lines[0]


def test_the_commit_of_a_folder_above_is_not_ours(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "f").write_text("1")
    for words in (["init", "-q"], ["add", "f"], ["commit", "-qm", "of the user's project"]):
        subprocess.run([*git, *words], check=True)
    installed = tmp_path / "site-packages"
    installed.mkdir()
    assert git_commit(installed) is None
    assert len(git_commit(tmp_path) or "") == 40
    assert changed_files(tmp_path) == 0
    (tmp_path / "f").write_text("2")
    assert changed_files(tmp_path) == 1
