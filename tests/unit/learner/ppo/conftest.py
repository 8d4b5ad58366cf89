"""`world`: helpers of the learner's tests, shared with tests/numerics."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def world() -> ModuleType:
    """The module tests/ppo_world.py."""
    name = "accord_tests_ppo_world"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).resolve().parent / _PATH)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


_PATH = "../../../ppo_world.py"


@pytest.fixture(scope="session")
def tiny(world: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a fresh Qwen2 of 24 tokens, two layers."""
    return Path(world.make_model(tmp_path_factory.mktemp("tiny") / "model"))
