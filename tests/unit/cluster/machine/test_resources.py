"""A resource that Ray does not have is named, with the setting that asks for it."""

from __future__ import annotations

import pytest

from cluster.machine.resources import Need, shortage

LEARNER = Need("learner.gpus", "GPU", 1, 2)
WORKERS = Need("rollout.cpus", "CPU", 4, 3)
REWARD = Need("reward", "CPU", 1)


@pytest.mark.parametrize(
    ("needs", "there", "says"),
    [
        ([WORKERS, REWARD], {"CPU": 13.0}, ""),
        ([Need("rollout.gpus", "GPU", 0)], {"CPU": 1.0}, ""),
        ([Need("rollout.gpus", "GPU", 0.1, 10)], {"GPU": 1.0}, ""),
        (
            [WORKERS, REWARD],
            {"CPU": 8.0},
            "rollout.cpus: the run asks for 13 CPU (rollout.cpus = 4 for 3, reward = 1), Ray has 8"
            "\n  fix: lower rollout.cpus or reward, or give cluster.num_cpus",
        ),
        (
            [LEARNER, WORKERS],
            {"CPU": 64.0},
            "learner.gpus: the run asks for 2 GPU (learner.gpus = 1 for 2), Ray has 0\n"
            "  fix: lower learner.gpus, or give a machine with more GPUs",
        ),
    ],
)
def test_shortages(needs: list[Need], there: dict[str, float], says: str) -> None:
    assert str(shortage(needs, there) or "") == says
