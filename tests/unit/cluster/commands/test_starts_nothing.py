"""A mistake in a config is told before anything is started or imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
CODE = """
import sys
import launch
try:
    launch.main()
except SystemExit as ended:
    import psutil
    heavy = [name for name in ("torch", "transformers", "ray", "vllm") if name in sys.modules]
    print(ended.code, heavy, psutil.Process().children())
"""


@pytest.mark.parametrize("command", ["train", "sft", "evaluate", "pipeline"])
def test_a_wrong_config_starts_and_imports_nothing(command: str, tmp_path: Path) -> None:
    config = tmp_path / "wrong.toml"
    config.write_text("[nonsense]\nkey = 1\n", "utf-8")
    done = subprocess.run(
        [sys.executable, "-c", CODE, command, str(config)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCORD_NO_BOOTSTRAP": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == ["2 [] []"]
    assert "nonsense" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == [config]
