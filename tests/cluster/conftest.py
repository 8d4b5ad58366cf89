"""Labs for the tests of this folder, which are marked `lab` and skipped where none can be had."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from hosts import Lab, hosts, missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    for item in items:
        if item.get_closest_marker("lab") and reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"no lab of hosts: {reason}"))


@pytest.fixture(scope="module")
def make_lab() -> Any:
    """``with make_lab(3) as lab``: three hosts (`hosts.Lab`)."""
    return hosts


@pytest.fixture(scope="module")
def three_hosts() -> Iterator[Lab]:
    lab_of_three: AbstractContextManager[Lab] = hosts(3)
    with lab_of_three as lab:
        yield lab
