"""The committed gRPC code is what the .proto says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROTO = "reward_service/proto/reward.proto"


def test_generated_code_is_current(tmp_path: Path) -> None:
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "pyi")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, PROTO]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr

    made = {path.name: path for path in (tmp_path / PROTO).parent.iterdir()}
    committed = {path.name: path for path in (ROOT / PROTO).parent.glob("*_pb2*") if path.is_file()}
    assert made.keys() == committed.keys()
    stale = [n for n, path in made.items() if path.read_bytes() != committed[n].read_bytes()]
    assert stale == [], "run `make proto` and commit what it writes"
