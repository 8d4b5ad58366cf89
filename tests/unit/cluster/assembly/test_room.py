"""What a run asks Ray for."""

from __future__ import annotations

import pytest

from cluster.assembly.auto.resolve import resolve_training
from cluster.assembly.room import resource_needs
from cluster.contracts.config.file import load_config
from cluster.contracts.config.train import TrainConfig
from cluster.machine.hardware import Machine
from cluster.machine.resources import Node, shortage

WORDS = ["model.path=m", "data.prompts=p.jsonl", 'reward.sources=[{type="rules",max_words=3}]']


@pytest.mark.parametrize("gpus", [0, 1, 8])
@pytest.mark.parametrize("cores", [1, 2, 4, 7, 8, 9, 16, 64])
@pytest.mark.parametrize("workers", [1, 2, 6])
def test_what_is_chosen_for_a_machine_is_there(cores: int, gpus: int, workers: int) -> None:
    memory = 80_000 if gpus else 0
    machine = Machine(
        cores=cores, memory_mb=64_000, shared_memory_mb=32_000, gpus=gpus, gpu_memory_mb=memory
    )
    config = load_config(TrainConfig, None, [*WORDS, f"rollout.workers={workers}"])
    resolved = resolve_training(config, machine, None).config
    assert isinstance(resolved.cluster.num_cpus, int)
    ray_has = {"CPU": float(resolved.cluster.num_cpus), "GPU": float(gpus)}
    assert shortage(resource_needs(resolved), [Node("here", ray_has)]) is None
