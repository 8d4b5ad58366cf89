"""What the machine has, and GPUs as the driver's tool tells of them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from cluster.machine import hardware
from cluster.machine.cores import own_cores

TOLD = "0, GPU-aaaa-1, 81559\n1, GPU-bbbb-2, 40960\n2, GPU-cccc-3, [N/A]\n"


def test_this_machine_is_plausible() -> None:
    found = hardware.this_machine()
    assert found.cores == len(own_cores())
    assert found.memory_mb > 256
    assert found.shared_memory_mb >= 0


@pytest.mark.parametrize(
    ("visible", "wanted"),
    [
        (None, [81559, 40960]),
        ("1", [40960]),
        ("GPU-aaaa", [81559]),
        ("", []),
        ("1,0", [81559, 40960]),
    ],
)
def test_gpus_that_this_process_may_use(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, wanted: list[int]
) -> None:
    def run(*args: Any, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(args, 0, TOLD, "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert hardware._gpu_figures("memory.total") == wanted


def test_no_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: Any, **kwargs: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", run)
    assert hardware._gpu_figures("memory.total") == []


def test_a_container_s_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(hardware, "CGROUP_LIMITS", (str(limit), str(tmp_path / "none")))
    limit.write_text("max\n")
    unlimited = hardware.this_machine().memory_mb
    limit.write_text(f"{128 << 20}\n")
    assert hardware.this_machine().memory_mb == 128 < unlimited


@pytest.mark.parametrize(
    ("line", "usable"),
    [("cuda: Optional[str] = None", False), ("cuda: Optional[str] = '12.8'", True)],
)
def test_a_torch_built_for_the_cpu_uses_no_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, usable: bool
) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '1'\n{line}\n")

    class Spec:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: Spec)
    assert hardware._torch_uses_gpus() is usable
