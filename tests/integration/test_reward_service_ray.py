"""The service in its Ray actor: loads elsewhere, answers here, dies when told to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from cluster.contracts.config.reward import (
    FunctionSource,
    RewardConfig,
    RewardModelSource,
    RulesSource,
)
from cluster.contracts.errors import UserError
from reward_service.certificate import run_access
from reward_service.client import RewardClient
from reward_service.remote import start_reward_service
from reward_service.source import ScoreItem

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
        logging_level="error",
    )
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_it_serves_pinned_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards.py").write_text(
        "import os\n"
        "def where(completions):\n"
        "    print('asked for', *completions)\n"
        "    cores = set.union(*(os.sched_getaffinity(int(t))"
        " for t in os.listdir('/proc/self/task')))\n"
        "    threads = int(os.environ['OMP_NUM_THREADS'])\n"
        "    return [1000 * threads + sum(cores)] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)  # the path below is relative to here, not to the actor's directory
    core = max(os.sched_getaffinity(0))
    own, theirs = run_access(encrypted=False)
    log = tmp_path / "logs" / "reward.log"
    handle = start_reward_service(
        RewardConfig(sources=[FunctionSource(path="rewards.py:where")]),
        1,
        (core,),
        reach="cluster",  # as on another host: what it prints is fetched
        access=own,
        timeout_s=60,
        log_file=log,
    )
    item = ScoreItem(id="a", messages=({"role": "user", "content": "q"},), response="r")
    with RewardClient([handle.address], deadline_s=10, access=theirs) as client:
        assert client.connect().scorer_version == handle.info.scorer_version
        assert client.score_items([item])[0].value == 1000 + core
        handle.stop()
        handle.stop()
        assert client.healthy(1.0) == {handle.address: False}
    assert log.read_text().endswith("asked for [{'role': 'assistant', 'content': 'r'}]\n")


@pytest.mark.usefixtures("cluster")
def test_errors_at_the_start_are_the_users_own(tmp_path: Path) -> None:
    absent = RewardConfig(sources=[RewardModelSource(path=str(tmp_path / "absent"))])
    with pytest.raises(UserError, match="no such reward-model directory") as caught:
        start_reward_service(absent, 1, timeout_s=60)
    assert caught.value.fix == "give a directory made by `accord reward-model`"
    with pytest.raises(UserError, match="did not start within 2 s"):
        start_reward_service(RewardConfig(sources=[RulesSource()]), 64, timeout_s=2)
