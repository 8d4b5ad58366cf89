"""A parcel through a real Ray: packed here, unpacked by two actors as if on another host."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import ray

from cluster.machine.parcels import Parcel, pack, unpack

pytestmark = pytest.mark.slow


class Role:
    def __init__(self, temporary: str) -> None:
        os.environ["TMPDIR"] = temporary  # where the host's cache lies

    def content(self, parcel: Parcel) -> tuple[str, str]:
        path = unpack(parcel)
        return str(path), sha256((path / "weights").read_bytes()).hexdigest()


@pytest.fixture
def cluster(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PYTHONPATH", str(repo_root))
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=80 << 20,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        _node_ip_address="127.0.0.1",
    )
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_content_larger_than_the_store_arrives_once(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    content = os.urandom(100 << 20)
    (folder / "weights").write_bytes(content)
    parcel = dataclasses.replace(pack(folder), path="/no/such/model")
    roles = [ray.remote(Role).options(num_cpus=1).remote(str(tmp_path)) for _ in range(2)]
    answers = ray.get([role.content.remote(parcel) for role in roles], timeout=120)
    assert {path for path, _ in answers} == {answers[0][0]}
    assert answers[0][0].startswith(str(tmp_path))
    assert all(found == sha256(content).hexdigest() for _, found in answers)
