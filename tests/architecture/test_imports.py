"""Who may import whom: the contracts of pyproject.toml, and the rules import-linter cannot say."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("actors", "learner", "reward_service", "cluster")
OURS = {*PACKAGES, "accord", "launch", "bootstrap"}

# The one door of each third party: path prefixes, or file names anywhere.
DOORS = {
    "vllm": ("actors/engines/", "cluster/measure/bench/plain_vllm.py"),
    "ray": (
        "remote.py",
        "learner/remote/",
        "cluster/machine/",
        "cluster/weights/",
        "cluster/runs/sinks.py",
    ),
    "grpc": ("reward_service/",),
    "fastapi": ("cluster/pages/",),
    "starlette": ("cluster/pages/",),
    "uvicorn": ("cluster/pages/",),
    "torch.distributed": (
        "learner/compute/ranks.py",
        "learner/compute/sharding.py",
        "learner/compute/mesh.py",
        "learner/compute/stored.py",
        "cluster/weights/",
    ),
}


def sources() -> list[Path]:
    """Our shipped Python files, generated ones left out."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    files += [
        path
        for path in (ROOT / "accord.py", ROOT / "launch.py", ROOT / "bootstrap.py")
        if path.exists()
    ]
    return [path for path in files if "_pb2" not in path.name]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            for alias in node.names:
                yield node.lineno, "." * node.level + f"{module}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called in ("importlib.import_module", "import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def names(dotted: str, module: str) -> bool:
    return dotted == module or dotted.startswith(module + ".")


def through(path: str, doors: tuple[str, ...]) -> bool:
    return any(
        path.startswith(door) if door.endswith("/") else path == door or path.endswith("/" + door)
        for door in doors
    )


def breaches_of_doors(path: str, tree: ast.AST) -> list[str]:
    return [
        f"{path}:{line} imports {name}: only {', '.join(doors)} may"
        for line, name in imported(tree)
        for module, doors in DOORS.items()
        if names(name, module) and not through(path, doors)
    ] + [
        f"{path}:{node.lineno} uses torch.distributed"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node) == "torch.distributed"
        and not through(path, DOORS["torch.distributed"])
    ]


@functools.cache
def parsed() -> list[tuple[str, ast.Module]]:
    return [(relative(path), ast.parse(path.read_text(encoding="utf-8"))) for path in sources()]


def test_the_contracts_of_pyproject_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [str(linter), "--no-cache", "--config", "pyproject.toml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_each_third_party_has_one_door() -> None:
    assert [text for path, tree in parsed() for text in breaches_of_doors(path, tree)] == []


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("actors/rollout.py", "def f():\n    from vllm import LLM"),
        ("cluster/loop/controller.py", "import ray.util"),
        ("launch.py", "import ray"),
        ("learner/compute/optimizer_step.py", "import torch.distributed as dist"),
        ("learner/compute/optimizer_step.py", "from torch import distributed"),
        ("learner/compute/optimizer_step.py", "import torch\ntorch.distributed.barrier()"),
        ("cluster/supervisor.py", "import importlib\nimportlib.import_module('grpc.aio')"),
    ],
)
def test_the_door_rule_sees_a_breach(path: str, code: str) -> None:
    assert breaches_of_doors(path, ast.parse(code))


def test_relative_imports_are_not_used() -> None:
    """Every rule here reads absolute names."""
    found = [
        f"{path}:{line}"
        for path, tree in parsed()
        for line, name in imported(tree)
        if name[0] == "."
    ]
    assert found == []


def test_the_contracts_are_a_leaf() -> None:
    """Of ours they import themselves only; of third parties pydantic, and for tables and row files
    the library that reads them."""
    allowed = {*sys.stdlib_module_names, "pydantic"}
    doors = {
        "cluster/contracts/rollout_table.py": ("pyarrow",),
        "cluster/contracts/samples.py": ("pyarrow",),
        "cluster/contracts/rows/files.py": ("pyarrow", "datasets"),
        "cluster/contracts/rows/folders.py": ("datasets",),
    }
    found = [
        f"{path}:{line} imports {name}"
        for path, tree in parsed()
        if path.startswith("cluster/contracts/")
        for line, name in imported(tree)
        if not names(name, "cluster.contracts")
        and name.split(".")[0] not in allowed
        and name.split(".")[0] not in doors.get(path, ())
    ]
    assert found == []


def test_the_algorithms_import_torch_only() -> None:
    allowed = {*sys.stdlib_module_names, "torch"}
    found = [
        f"{path}:{line} imports {name}"
        for path, tree in parsed()
        if path.startswith("learner/algorithms/")
        for line, name in imported(tree)
        if not names(name, "learner.algorithms") and name.split(".")[0] not in allowed
    ]
    assert found == []


def test_the_rest_of_cluster_does_not_know_the_transports() -> None:
    found = [
        f"{path}:{line} imports {name}"
        for path, tree in parsed()
        if path.startswith("cluster/")
        and not path.startswith(
            ("cluster/weights/", "cluster/measure/bench/", "cluster/measure/probe/")
        )  # these measure them
        for line, name in imported(tree)
        if names(name, "cluster.weights")
    ]
    assert found == []


def test_the_transports_know_the_contracts_only() -> None:
    allowed = ("cluster.contracts", "cluster.weights")
    found = [
        f"{path}:{line} imports {name}"
        for path, tree in parsed()
        if path.startswith("cluster/weights/")
        for line, name in imported(tree)
        if name.split(".")[0] in OURS and not any(names(name, module) for module in allowed)
    ]
    assert found == []


def test_launch_and_accord_are_the_roof() -> None:
    """Nothing imports launch or accord; bootstrap serves launch alone."""
    found = [
        f"{path}:{line} imports {name}"
        for path, tree in parsed()
        for line, name in imported(tree)
        if names(name, "launch")
        or names(name, "accord")
        or (names(name, "bootstrap") and path != "launch.py")
    ]
    assert found == []


def test_init_files_are_empty() -> None:
    inits = [path for path in sources() if path.name == "__init__.py"]
    assert [relative(path) for path in inits if path.stat().st_size] == []


def test_every_package_has_its_init_file() -> None:
    """A folder without one would be a namespace package, open to other distributions."""
    folders = {path.parent for path in sources() if path.parent != ROOT}
    assert [relative(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_no_module_is_named_like_the_standard_library() -> None:
    """`python learner/remote.py` would import learner/types.py where it means the standard one."""
    found = [relative(path) for path in sources() if path.stem in sys.stdlib_module_names]
    assert found == []


@pytest.mark.parametrize("module", ["cluster.contracts.config.train", "accord", "launch"])
def test_reading_a_config_imports_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'ray', 'vllm', 'grpc', 'transformers', 'numpy', 'pyarrow'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr
