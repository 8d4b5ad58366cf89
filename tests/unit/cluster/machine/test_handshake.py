"""The handshake names every host that runs other software, with both versions, in one message."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.contracts.errors import UserError
from cluster.machine import handshake
from cluster.machine.handshake import (
    PACKAGES,
    Software,
    code_digest,
    completed,
    differences,
    package_folders,
    require_same_software,
    require_this_host_is_like,
    software,
)

DRIVER = Software(
    host="host1",
    python="3.11.7",
    code="a" * 64,
    root="/env/accord",
    versions={"ray": "2.60.0", "torch": "2.13.0", "transformers": "5.17.0", "vllm": "0.32.0"},
)


def other(**changes: Any) -> Software:
    versions = {**DRIVER.versions, **changes.pop("versions", {})}
    return replace(DRIVER, host="host2", versions=versions, **changes)


def test_this_process_is_described_without_importing_a_package() -> None:
    found = software()
    assert found.versions["ray"]
    assert found.versions["torch"]
    assert "+" not in str(found.versions["torch"])
    assert differences(found, found) == []


@pytest.mark.parametrize(
    "found",
    [
        other(),
        other(python="3.11.12"),
        other(root="/elsewhere"),
        other(versions={"vllm": None}),
    ],
)
def test_what_does_not_matter_is_no_difference(found: Software) -> None:
    assert differences(DRIVER, found) == []


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (other(python="3.12.7"), "Python 3.12.7 instead of 3.11.7"),
        (other(versions={"torch": "2.12.0"}), "torch 2.12.0 instead of 2.13.0"),
        (other(versions={"torch": None}), "torch missing instead of 2.13.0"),
        (other(versions={"vllm": "0.31.0"}), "vllm 0.31.0 instead of 0.32.0"),
        (
            other(code="b" * 64, root="/old"),
            "Accord's source bbbbbbbbbbbb (from /old) instead of aaaaaaaaaaaa",
        ),
    ],
)
def test_a_difference_is_one_line_with_both_versions(found: Software, said: str) -> None:
    assert differences(DRIVER, found) == [said]


def test_all_differences_of_all_hosts_are_one_error() -> None:
    hosts = {
        "host2 (10.0.0.2)": other(versions={"torch": "2.12.0", "vllm": "0.31.0"}),
        "host3 (10.0.0.3)": other(),
        "host4 (10.0.0.4)": TimeoutError("no answer within 60 s"),
    }
    with pytest.raises(UserError) as error:
        require_same_software(DRIVER, hosts)
    assert str(error.value) == (
        "cluster.address: hosts of the cluster do not run the software of the driver (host1):\n"
        "  host2 (10.0.0.2): torch 2.12.0 instead of 2.13.0\n"
        "  host2 (10.0.0.2): vllm 0.31.0 instead of 0.32.0\n"
        "  host4 (10.0.0.4) does not answer: no answer within 60 s\n"
        "  fix: install the same versions on every host (one image for all is simplest), restart "
        "Ray there, and try again"
    )
    require_same_software(DRIVER, {"host3": other()})


def test_a_driver_without_vllm_wants_the_workers_to_have_the_same() -> None:
    driver = replace(DRIVER, versions={**DRIVER.versions, "vllm": None})
    hosts = {"host2": other(), "host3": other(versions={"vllm": "0.31.0"})}
    wanted = completed(driver, hosts)
    assert wanted.versions["vllm"] == "0.32.0"
    with pytest.raises(UserError, match=r"host3: vllm 0\.31\.0 instead of 0\.32\.0"):
        require_same_software(wanted, hosts)


def test_a_role_refuses_its_own_host(monkeypatch: pytest.MonkeyPatch) -> None:
    require_this_host_is_like(None)
    require_this_host_is_like(asdict(software()))
    monkeypatch.setattr(handshake, "software", lambda: other(versions={"torch": "2.12.0"}))
    with pytest.raises(UserError, match=r"host2: torch 2\.12\.0 instead of"):
        require_this_host_is_like(asdict(DRIVER))


def test_the_digest_sees_every_file(tmp_path: Path) -> None:
    digests, folders = [], [tmp_path / package for package in PACKAGES]
    for package in PACKAGES:
        (tmp_path / package / "deep").mkdir(parents=True)
        (tmp_path / package / "deep" / "code.py").write_text("x = 1\n")
        digests.append(code_digest(folders))
    (tmp_path / "cluster" / "deep" / "code.py").write_text("x = 2\n")
    digests.append(code_digest(folders))
    (tmp_path / "cluster" / "deep" / "code.py").rename(tmp_path / "cluster" / "deep" / "other.py")
    digests.append(code_digest(folders))
    assert len(set(digests)) == 6
    (tmp_path / "cluster" / "__pycache__").mkdir()
    (tmp_path / "cluster" / "__pycache__" / "code.pyc").write_text("x")
    assert code_digest(folders) == digests[-1]
    assert [path.name for path in package_folders()] == list(PACKAGES)
