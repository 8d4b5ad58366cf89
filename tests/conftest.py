"""What every test relies on; it runs before any test module is imported."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest

# One thread per process: with more, OpenMP's spinning makes two busy processes starve each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A test says it if it wants the network; none reports to anybody.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Without it every process of the suite, Ray workers too, would compile its imports again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
if shutil.which("g++") is None:  # vLLM compiles its sampler otherwise
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

# A shell that starts the tests in the background ignores SIGINT for them and all their children;
# the commands that the tests interrupt have to hear it.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The clone's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def world() -> ModuleType:
    """The module tests/ppo_world.py: helpers of the learner's tests."""
    return _helpers("ppo_world")


@pytest.fixture(scope="session")
def run_dirs() -> ModuleType:
    """The module tests/pages_world.py: run directories for the tests of pages."""
    return _helpers("pages_world")


def _helpers(name: str) -> ModuleType:
    known = f"accord_tests_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, ROOT / "tests" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[known] = module
        spec.loader.exec_module(module)
    return sys.modules[known]


@pytest.fixture(scope="session")
def tiny(world: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a fresh Qwen2 of 24 tokens, two layers."""
    return Path(world.make_model(tmp_path_factory.mktemp("tiny") / "model"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked `gpu` where there is no GPU, and says so."""
    if shutil.which("nvidia-smi"):
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
