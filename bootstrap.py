#!/usr/bin/env python3
"""Makes Accord's Python environment, once, so that a clone needs only git, make and Python 3.11.

Standard library only, and no syntax newer than Python 3.7: this file must be able to say that the
Python running it is too old. `launch.py` calls `reexec()` before its first third-party import, and
every target of the Makefile runs this file first. A stamp, written last, makes that cost nothing.

Knobs (environment variables):
    ACCORD_VENV          where the environment lives (default: .venv beside this file). It serves
                         one clone at a time: it imports the one that ran this file last.
    ACCORD_VARIANT       cpu or gpu: which lock in requirements/ is installed (default: what the
                         environment holds already, else gpu if nvidia-smi is found, else cpu).
    ACCORD_NO_UV         install with pip alone (some two minutes longer).
    ACCORD_NO_BOOTSTRAP  do nothing: the running Python has the packages (container images).

Linux is where this is run. On macOS it leaves out vLLM, which has no build there (generation then
uses the transformers engine); neither that path nor the gpu lock has been run by the authors.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Iterator

ROOT = Path(__file__).resolve().parent
UV = "uv==0.13.8"
OLDEST_PYTHON = (3, 11)
NEWEST_GPU_PYTHON = (3, 12)  # cuda-python, which vllm pins, has no wheel for a newer one
VARIANTS = ("cpu", "gpu")
RECIPE = "1"  # raise it when an environment made by an older version of this file must be remade
STAMP = ".accord-ready"  # what the finished environment holds
UNFINISHED = ".accord-unfinished"  # stands while an environment is being made
LOCK = ".accord-lock"  # held by the process that is making it
WAIT_FOR_OTHER_S = 1800.0
PIP_QUIET = ("-qq", "--disable-pip-version-check")  # errors only
MAC = sys.platform == "darwin"
# Not for a child: they would make it import other packages, or import slowly for ever.
DROPPED_ENV = ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
SMOKE = (
    "import torch, transformers, ray, grpc, pyarrow, pydantic, typer\n"
    "import actors, learner, reward_service, cluster\n"
)
SMOKE_VLLM = {"cpu": "from vllm import LLM\n", "gpu": "import vllm\n"}


def say(text: str) -> None:
    """One line for the user; standard output stays free for what the command itself prints."""
    print("accord: " + text, file=sys.stderr, flush=True)


def stop(what: str, fix: str) -> None:
    """Ends the process with a user's error: what is wrong, then what to do about it."""
    say(what)
    say("fix: " + fix)
    raise SystemExit(2)


def venv_dir() -> Path:
    return Path(os.environ.get("ACCORD_VENV") or ROOT / ".venv").absolute()


def reexec() -> None:
    """Returns only in a Python that has the environment; otherwise makes it and starts over in it.

    Costs two small file reads when the running Python is the environment's own (the `accord`
    command, a Ray worker). Does nothing where `accord-rlhf` was installed in another way.
    """
    if os.environ.get("ACCORD_NO_BOOTSTRAP") or not (ROOT / "requirements").is_dir():
        return
    venv = venv_dir()
    if Path(sys.prefix).resolve() == venv.resolve():
        if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
            sys.dont_write_bytecode = False
        held = read_stamp(venv)
        if held is not None and held[0] != packages_key(held[0].split()[0]):
            say(f"{venv} is older than requirements/; run `make setup` to renew it")
        return
    if installed_here():
        return
    python = ensure()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    arguments = getattr(sys, "orig_argv", [sys.executable, *sys.argv])[1:]
    os.execv(str(python), [str(python), *arguments])


def installed_here() -> bool:
    """Whether the running Python has Accord by another way than this file (pip, an image)."""
    if sys.version_info < OLDEST_PYTHON:
        return False
    from importlib import metadata

    # The clone itself may hold build metadata; only an installation outside it counts.
    elsewhere = [entry for entry in sys.path if entry and Path(entry).resolve() != ROOT]
    return any(metadata.distributions(name="accord-rlhf", path=elsewhere))


def ensure() -> Path:
    """Makes or renews the environment if it has to be, and returns its Python."""
    if os.environ.get("ACCORD_NO_BOOTSTRAP"):
        return Path(sys.executable)
    venv = venv_dir()
    python = venv / "bin" / "python"
    variant = choose_variant(venv)
    if is_ready(venv, variant):
        return python
    started = time.monotonic()
    venv.mkdir(parents=True, exist_ok=True)
    with only_one(venv):
        if is_ready(venv, variant):
            return python
        held = read_stamp(venv)
        has_packages = held is not None and held[0] == packages_key(variant) and python.exists()
        if not has_packages:
            say(f"installing the {variant} environment into {venv} (once: a minute, 3 GB)")
            make_environment(venv, variant)
        install_project(python)
        if not has_packages:
            check_imports(python, variant)
        write_stamp(venv, variant)
    say(f"the environment is ready ({time.monotonic() - started:.0f} s)")
    return python


# --- what an environment holds


def choose_variant(venv: Path) -> str:
    asked = os.environ.get("ACCORD_VARIANT")
    if asked:
        if asked not in VARIANTS:
            stop(f"ACCORD_VARIANT is {asked!r}", "set it to cpu or gpu, or leave it unset")
        return asked
    held = read_stamp(venv)
    if held is not None and held[0].split()[0] in VARIANTS:
        return held[0].split()[0]
    return "gpu" if shutil.which("nvidia-smi") else "cpu"


def lock_file(variant: str) -> Path:
    return ROOT / "requirements" / (variant + ".txt")


def packages_key(variant: str) -> str:
    digest = hashlib.sha256(RECIPE.encode() + lock_file(variant).read_bytes()).hexdigest()
    return f"{variant} {digest}"


def project_key() -> str:
    """Names this clone and its build settings: what the editable install depends on."""
    return f"{hashlib.sha256((ROOT / 'pyproject.toml').read_bytes()).hexdigest()} {ROOT}"


def read_stamp(venv: Path) -> list[str] | None:
    """The packages' line and the project's line, or None where no finished environment stands."""
    stamp = venv / STAMP
    lines = stamp.read_text(encoding="utf-8").splitlines() if stamp.exists() else []
    return lines if len(lines) == 2 and lines[0] else None


def write_stamp(venv: Path, variant: str) -> None:
    new = venv / (STAMP + ".new")
    new.write_text(f"{packages_key(variant)}\n{project_key()}\n", encoding="utf-8")
    os.replace(str(new), str(venv / STAMP))
    if (venv / UNFINISHED).exists():
        (venv / UNFINISHED).unlink()


def is_ready(venv: Path, variant: str) -> bool:
    # bin/python dangles when the Python it was made from has been removed.
    return (venv / "bin" / "python").exists() and read_stamp(venv) == [
        packages_key(variant),
        project_key(),
    ]


@contextlib.contextmanager
def only_one(venv: Path) -> Iterator[None]:
    """Holds the environment against a second process that would make it at the same time."""
    deadline = time.monotonic() + WAIT_FOR_OTHER_S
    told = False
    with open(str(venv / LOCK), "w") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    stop(
                        f"another process has been making {venv} for {WAIT_FOR_OTHER_S:.0f} s",
                        f"end the process that holds {venv / LOCK}, then run this again",
                    )
                if not told:
                    say(f"waiting for another process that is making {venv}")
                    told = True
                time.sleep(0.5)
        yield


# --- making it


def make_environment(venv: Path, variant: str) -> None:
    if not sys.platform.startswith(("linux", "darwin")):
        stop(f"Accord runs on Linux; this is {sys.platform}", "use a Linux machine or a container")
    if MAC:
        say("macOS: vLLM has no build here; generation will use the transformers engine")
    python = venv / "bin" / "python"
    made_here = (venv / UNFINISHED).exists() or read_stamp(venv) is not None
    if made_here or not python.exists():
        base = choose_python(variant)
        if made_here:  # an environment of somebody else's is never deleted, only added to
            empty(venv)
        (venv / UNFINISHED).touch()
        if call([base, "-m", "venv", str(venv)]) != 0:
            stop(f"{base} could not make a virtual environment", "see the lines above")
    install_packages(python, variant)


def empty(venv: Path) -> None:
    for entry in list(venv.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(str(entry))
        elif entry.name != LOCK:
            entry.unlink()


def choose_python(variant: str) -> str:
    """A Python that can be used, preferring one for which a local torch wheel stands ready."""
    running = getattr(sys, "_base_executable", sys.executable)  # never the one about to be remade
    names = [running, *(shutil.which(f"python3.{minor}") for minor in (11, 12, 13, 14))]
    usable = []
    for name in names:
        version = python_version(name) if name else None
        newest = NEWEST_GPU_PYTHON if variant == "gpu" else version
        if name and version and newest and OLDEST_PYTHON <= version <= newest:
            usable.append((name, version))
    if not usable:
        stop(
            f"no Python that fits was found (this one is {sys.version.split()[0]})",
            "install Python 3.11 or 3.12 with its venv module"
            " (Debian, Ubuntu: apt install python3.11-venv) and have it on PATH",
        )
    tags = local_torch_tags() if variant == "cpu" else set()
    for name, version in usable:
        if "cp{}{}".format(*version) in tags:
            return name
    return usable[0][0]


def python_version(executable: str) -> tuple[int, int] | None:
    """(major, minor) of a Python that can make virtual environments, else None."""
    probe = "import sys, venv, ensurepip; print(sys.version_info[0], sys.version_info[1])"
    result = subprocess.run(
        [executable, "-c", probe], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    words = result.stdout.split()
    return (int(words[0]), int(words[1])) if result.returncode == 0 and len(words) == 2 else None


def find_links() -> list[str]:
    """Folders of wheels this machine offers; uv does not read pip's settings by itself."""
    set_here = os.environ.get("UV_FIND_LINKS", "").replace(",", " ")
    return (set_here or os.environ.get("PIP_FIND_LINKS") or pip_setting("find-links")).split()


def local_torch_tags() -> set[str]:
    """Python tags ("cp311") of the locked torch's wheels in those folders."""
    first = lock_file("cpu").read_text(encoding="utf-8").split()[0]
    pattern = first.replace("==", "-") + "-cp*.whl"
    folders = [Path(entry) for entry in find_links() if os.path.isdir(entry)]
    return {wheel.name.split("-")[2] for folder in folders for wheel in folder.glob(pattern)}


def pip_setting(name: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global." + name],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return result.stdout.strip() if result.returncode == 0 else ""


def wanted(variant: str) -> list[str]:
    """The lock's lines for this system."""
    lines = lock_file(variant).read_text(encoding="utf-8").split()
    if MAC:  # torch's ordinary build is the CPU one there; vLLM and Intel's OpenMP have none
        lines = [line.split("+")[0] for line in lines if not line.startswith(("vllm", "intel-"))]
    return lines


def install_packages(python: Path, variant: str) -> None:
    pins = wanted(variant)
    listed = python.parent.parent / ".accord-packages.txt"
    listed.write_text("\n".join(pins) + "\n", encoding="utf-8")
    say(f"{len(pins)} packages, as pinned in requirements/{variant}.txt")
    if use_uv(python):
        for extra, settings in uv_sources(variant):
            command = [*uv_install(python), "--no-deps", "-r", str(listed), *extra]
            if call(command, settings) == 0:
                return
        say("uv could not install them; trying pip")
    command = [str(python), "-m", "pip", "install", *PIP_QUIET, "--no-deps", "-r", str(listed)]
    if call(command, {"PIP_FIND_LINKS": ""} if variant == "gpu" else None) != 0:
        stop(
            "the packages could not be installed; the lines above say which",
            "check the network; the CPU build of torch is not on the standard index: let"
            " PIP_EXTRA_INDEX_URL name PyTorch's CPU index, or PIP_FIND_LINKS a folder with it",
        )


def use_uv(python: Path) -> bool:
    """Whether the environment has uv (it is put there first), unless pip alone was asked for."""
    if os.environ.get("ACCORD_NO_UV"):
        return False
    if (python.parent / "uv").exists():
        return True
    pip = [str(python), "-m", "pip", "install", *PIP_QUIET, UV]
    return call(pip) == 0


def uv_install(python: Path) -> list[str]:
    return [str(python.parent / "uv"), "pip", "install", "-q", "--python", str(python)]


def uv_sources(variant: str) -> list[tuple[list[str], dict[str, str]]]:
    """The places uv is told to look in, best first: (extra arguments, environment)."""
    settings = {}
    given = os.environ.get("SSL_CERT_FILE") or os.environ.get("PIP_CERT")
    certificate = given or pip_setting("cert")
    if certificate:
        settings["SSL_CERT_FILE"] = certificate
    # An empty UV_FIND_LINKS hides the CPU wheel, which would satisfy the gpu lock's torch as well.
    plain = {**settings, "UV_FIND_LINKS": ""}
    if variant == "gpu" or MAC:
        return [([], plain)]
    from_index = (["--torch-backend", "cpu"], plain)
    links = find_links()
    if not links:
        return [from_index]
    return [([], {**settings, "UV_FIND_LINKS": ",".join(links)}), from_index]


def install_project(python: Path) -> None:
    """Installs this clone itself, editable, with the build tools of the environment: no network."""
    project = ["--no-deps", "--no-build-isolation", "-e", str(ROOT)]
    pip = [str(python), "-m", "pip", "install", *PIP_QUIET]
    if call([*(uv_install(python) if use_uv(python) else pip), *project]) != 0:
        stop(f"{ROOT} could not be installed into {python.parent.parent}", "see the lines above")


def check_imports(python: Path, variant: str) -> None:
    """Imports what matters once, which also writes the byte code that later starts are quick by."""
    say("first import (compiles the packages, once)")
    code = SMOKE + ("" if MAC else SMOKE_VLLM[variant])
    # From another folder than the clone: it is the installed packages that must be found.
    result = subprocess.run(
        [str(python), "-c", code],
        env=child_env(),
        cwd=str(python.parent),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode != 0:
        say("\n".join(result.stdout.splitlines()[-15:]))
        stop(
            "the packages were installed, but cannot be imported (above)",
            f"remove {python.parent.parent} and run this again",
        )


def child_env() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in DROPPED_ENV}


def call(command: list[str], settings: dict[str, str] | None = None) -> int:
    """Runs a command in the clone, its output going to the user; returns its exit status."""
    environment = {**child_env(), **(settings or {})}
    return subprocess.run(command, env=environment, cwd=str(ROOT), stdout=sys.stderr).returncode


if __name__ == "__main__":
    ensure()
