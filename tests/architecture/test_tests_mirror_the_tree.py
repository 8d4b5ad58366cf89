"""tests/unit mirrors the packages: a test file lies where the code it tests lies."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_folder_of_unit_tests_is_a_folder_of_code() -> None:
    unit = ROOT / "tests" / "unit"
    folders = {path.parent.relative_to(unit) for path in unit.rglob("test_*.py")}
    assert [str(folder) for folder in sorted(folders) if not (ROOT / folder).is_dir()] == []


def test_every_room_with_code_has_unit_tests_or_names_where_they_are() -> None:
    """Rooms whose code only runs with real Ray, vLLM or a terminal are tested elsewhere."""
    elsewhere = {
        "actors/engines": "tests/integration",
        "cluster/assembly": "tests/integration",
        "cluster/measure/bench": "tests/unit/cluster/measure",
        "cluster/measure/probe": "tests/unit/cluster/measure",
        "cluster/measure/simulation": "tests/unit/cluster/measure",
        "learner/algorithms": "tests/numerics",
        "cluster/contracts/config": "tests/unit/cluster/contracts",
    }
    packages = ("actors", "cluster", "learner", "reward_service")
    inits = [path for package in packages for path in (ROOT / package).rglob("__init__.py")]
    rooms = {
        path.parent.relative_to(ROOT).as_posix()
        for path in inits
        if any(f.stat().st_size and "_pb2" not in f.name for f in path.parent.glob("*.py"))
    }
    bare = {room for room in rooms if not list((ROOT / "tests/unit" / room).glob("test_*.py"))}
    assert sorted(bare - set(elsewhere)) == []
    assert [place for place in elsewhere.values() if not (ROOT / place).is_dir()] == []
