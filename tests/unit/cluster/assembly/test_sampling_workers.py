"""How many workers a job is worth, and when Ray is started for it."""

from __future__ import annotations

import dataclasses

import pytest

from cluster.assembly import local_workers, sampling
from cluster.assembly.local_workers import sampling_cluster
from cluster.assembly.model_facts import ModelFacts
from cluster.assembly.sampling import Sampling
from cluster.contracts.config.base import ClusterConfig, ModelConfig
from cluster.contracts.config.rollout import RolloutConfig
from cluster.contracts.records import Prompt
from cluster.machine.hardware import Machine, this_machine

PROMPT = Prompt(id="p", messages=(), token_ids=(1,))
FACTS = ModelFacts(
    parameters=900_000, layers=2, hidden=64, kv_heads=2, head_size=32, vocabulary=512, context=256
)


@pytest.mark.parametrize(
    ("prompts", "parameters", "workers"),
    [(400, 900_000, 1), (1600, 900_000, 4), (400, 19_000_000, 10), (1, 19_000_000, 1)],
)
def test_a_worker_has_more_to_do_than_its_start_costs(
    prompts: int, parameters: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = dataclasses.replace(FACTS, parameters=parameters)
    monkeypatch.setattr(sampling, "read_model_facts", lambda model: facts)
    job = Sampling(
        model=ModelConfig(path="m"),
        prompts=[PROMPT] * prompts,
        samples=1,
        rollout=RolloutConfig(max_tokens=64, workers=64),
        max_prompt_tokens=1,
    )
    found = sampling._worth_starting(job)
    assert found == pytest.approx(workers, abs=workers // 2)


@pytest.mark.parametrize(
    ("cluster", "rollout", "gpus", "ray"),
    [
        ({}, {}, 0, False),
        ({"address": "auto"}, {}, 0, True),
        ({}, {}, 1, True),
        ({}, {"gpus": 1}, 0, True),
        ({}, {"resources": {"fast": 1}}, 0, True),
        ({"dashboard": True}, {}, 0, True),
    ],
)
def test_ray_is_started_where_workers_need_it(
    cluster: dict[str, object],
    rollout: dict[str, object],
    gpus: int,
    ray: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine: Machine = dataclasses.replace(this_machine(), gpus=gpus)
    monkeypatch.setattr(local_workers, "this_machine", lambda: machine)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = local_workers._alone(
        ClusterConfig.model_validate(cluster), RolloutConfig.model_validate(rollout)
    )
    assert found is not ray


def test_without_ray_no_file_has_to_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    machine = dataclasses.replace(this_machine(), gpus=0)
    monkeypatch.setattr(local_workers, "this_machine", lambda: machine)
    with sampling_cluster(ClusterConfig(), RolloutConfig()) as info:
        assert info["started"]
