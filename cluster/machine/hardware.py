"""What the machine has: cores, memory, GPUs. Imports nothing heavy and takes milliseconds."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cluster.machine.cores import own_cores
from cluster.machine.products import Products, measure_products

MB = 1 << 20
SHARED_MEMORY = "/dev/shm"
CGROUP_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What this process may use. gpu_memory_mb: of the smallest GPU; 0 without one. gpu_compute:
    the smallest compute capability of the GPUs, None where the driver does not tell. products:
    measures how fast one core multiplies (`measure_products`); None: nobody does."""

    cores: int
    memory_mb: int
    shared_memory_mb: int
    gpus: int = 0
    gpu_memory_mb: int = 0
    gpu_compute: float | None = None
    products: Callable[[int, int, int], Products] | None = field(
        default=None, repr=False, compare=False
    )


def this_machine() -> Machine:
    """Cores by affinity, memory by the container's limit, GPUs that the installed torch can use."""
    gpus = _gpu_figures("memory.total") if _torch_uses_gpus() else []
    return Machine(
        cores=len(own_cores()),
        memory_mb=min([psutil.virtual_memory().total, *_container_limits()]) // MB,
        shared_memory_mb=_shared_memory_mb(),
        gpus=len(gpus),
        gpu_memory_mb=int(min(gpus, default=0)),
        # Asked on its own: an old driver refuses the whole question.
        gpu_compute=min(_gpu_figures("compute_cap"), default=None) if gpus else None,
        products=measure_products,
    )


def processor() -> str:
    """What the processor is called; the kind of machine where that is not known."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _container_limits() -> list[int]:
    found = []
    for place in CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # no such file; or "max", which is no limit
            found.append(int(Path(place).read_text(encoding="ascii")))
    return found


def _shared_memory_mb() -> int:
    with suppress(OSError):
        return shutil.disk_usage(SHARED_MEMORY).total // MB
    return psutil.virtual_memory().total // MB  # no such folder: Ray then uses its own files


def _torch_uses_gpus() -> bool:
    """Whether the installed torch was built for CUDA; read, as importing it takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version = Path(spec.origin).with_name("version.py")
    with suppress(OSError):
        return re.search(r"^cuda\b.*= *['\"]", version.read_text("utf-8"), re.M) is not None
    return False


def _gpu_figures(what: str) -> list[float]:
    """A figure of each visible GPU (memory: MiB), by the driver's own tool; none where that is
    missing or does not tell."""
    visible = _visible()
    command = ["nvidia-smi", f"--query-gpu=index,uuid,{what}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[part.strip() for part in line.split(",")] for line in told.stdout.splitlines()]
    return [
        float(row[2])
        for row in rows
        if len(row) == 3
        and re.fullmatch(r"\d+(\.\d+)?", row[2])
        and (visible is None or row[0] in visible or any(row[1].startswith(v) for v in visible))
    ]


def _visible() -> set[str] | None:
    """The entries of CUDA_VISIBLE_DEVICES, None where it is not set."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if given is None else {part.strip() for part in given.split(",") if part.strip()}
