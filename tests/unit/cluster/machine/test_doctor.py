"""Each check on a host that is as it should be, and on one that is not."""

from __future__ import annotations

import errno
import json
import os
import socket
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest

from cluster.assembly import doctor as assembly
from cluster.machine import doctor
from cluster.machine.hardware import Machine

REQUIRED = ["torch==2.13.*", "ray[default]<2.61,>=2.60", 'vllm==0.32.0; extra == "gpu"']
MACHINE = Machine(cores=4, memory_mb=8192, shared_memory_mb=4096)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def states(*findings: doctor.Finding) -> list[str]:
    assert all(one.fix for one in findings if one.state != "ok")
    return [one.state for one in findings]


def packages(**versions: str) -> list[doctor.Finding]:
    return doctor.check_packages(REQUIRED, versions.get)


def test_the_packages_of_this_environment_are_in_range() -> None:
    found = doctor.check_packages(requires("accord-rlhf") or [], doctor.installed)
    assert states(found[0]) == ["ok"], found


def test_packages_out_of_range_are_named() -> None:
    good, engine = packages(torch="2.13.0+cpu", ray="2.60.0", vllm="0.32.0+cu130")
    assert states(good, engine) == ["ok", "ok"]
    old, engine = packages(torch="2.12.1", vllm="0.31.0")
    assert states(old, engine) == ["fail", "fail"]
    assert old.says == "torch 2.12.1 is not ==2.13.*; ray is missing"
    assert states(packages(torch="2.13.0", ray="2.60.0")[1]) == ["warn"]


@pytest.mark.parametrize(
    ("finding", "state"),
    [
        (doctor.check_python("3.12.1"), "ok"),
        (doctor.check_python("3.14.0"), "warn"),
        (doctor.check_cores(2), "ok"),
        (doctor.check_cores(1), "warn"),
        (doctor.check_memory(8000), "ok"),
        (doctor.check_memory(1000), "warn"),
        (doctor.check_shared_memory(64, 256), "warn"),
        (doctor.check_shared_memory(4096, 256), "ok"),
        (doctor.check_gpus(MACHINE, None), "ok"),
        (doctor.check_gpus(MACHINE, "H100, driver 580"), "warn"),
        (doctor.check_limits(1024, -1), "warn"),
        (doctor.check_limits(-1, 100), "warn"),
        (doctor.check_limits(65536, 65536), "ok"),
    ],
)
def test_each_state_of_a_host(finding: doctor.Finding, state: str) -> None:
    assert states(finding) == [state]


def test_the_disk_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    assert states(*doctor.check_disk(tmp_path / "not" / "yet")) == ["ok"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_a_disk_that_refuses_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*words: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os if call == "fsync" else Path, call, refuse)
    (found,) = doctor.check_disk(tmp_path)
    assert found.state == "fail"
    assert "No space left" in found.says
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_rays_token(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert states(doctor.check_token()) == ["ok"]
    file = home / ".ray" / "auth_token"
    file.parent.mkdir(parents=True)
    file.write_text("t")
    file.chmod(0o644)
    assert states(doctor.check_token()) == ["fail"]
    file.chmod(0o600)
    assert states(doctor.check_token()) == ["ok"]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert states(doctor.check_token()) == ["fail"]


def test_a_service_is_reached_or_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert states(doctor.check_reachable("reward.address", address)) == ["ok"]
    assert states(doctor.check_reachable("reward.address", address)) == ["fail"]


def test_a_line_each_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "runs" / "r"
    run.mkdir(parents=True)
    (run / "config.toml").write_text('[reward]\naddress = "127.0.0.1:1"\n')
    found = assembly.examine(run)
    assert not assembly.tell(found, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(found)
    (line,) = [line for line in lines if line.startswith("fail")]
    assert "127.0.0.1:1 cannot be reached" in line
    assert "; fix: start it" in line
    assert f"disk of {run}" in "\n".join(lines)
    assert not assembly.tell(found, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert [check["name"] for check in told["checks"]] == [one.name for one in found]


def test_a_host_of_a_cluster_is_one_line() -> None:
    bad = doctor.Finding("cores", "warn", "one core", "use more")
    good = {"machine": MACHINE, "findings": [], "time": 100.0}
    assert assembly._host("b", good, 99.0, 101.0).state == "ok"
    late = assembly._host("b", {**good, "findings": [bad]}, 150.0, 151.0)
    assert late.state == "warn"
    assert "cores: one core; clock: is -50 s off" in late.says
    assert late.fix == "use more; synchronise (NTP)"
    assert assembly._host("b", TimeoutError("no answer"), 1.0, 2.0).state == "fail"
