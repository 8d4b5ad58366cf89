"""A worker proves a swap, whatever way the weights came: host arrays or tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from actors.engines.transformers_engine import TransformersEngine
from actors.rollout import RolloutWorker, WorkerSettings
from actors.settings import EngineSettings
from cluster.contracts.errors import WeightMismatch
from cluster.contracts.records import WeightManifest
from cluster.weights.transports import PublisherOptions, make_publisher, make_receiver
from learner.models.load import load_policy
from learner.rl.publish import buckets, canary


class Sender:
    """A learner that takes one step at lr 1e-7 before each version."""

    def __init__(self, world: ModuleType, tiny: Path, transport: str, folder: Path) -> None:
        self.policy = load_policy(world.make_settings(tiny).model)
        options = PublisherOptions(directory=str(folder))
        self.publisher = make_publisher(transport, options)
        self.version = 0

    @torch.no_grad()
    def publish(self) -> WeightManifest:
        generator = torch.Generator().manual_seed(self.version)
        for parameter in self.policy.parameters():
            parameter += 1e-7 * torch.randn(parameter.shape, generator=generator).sign()
        check = canary(self.policy, list(range(2, 20)), "float32", None)
        parts = buckets(
            self.policy, "float32", on_device=self.publisher.on_device, limit_bytes=2000
        )
        with self.publisher.open(self.version) as update:
            for arrays, dtypes in parts:
                update.add(arrays, dtypes)
            manifest = update.close(check)
        assert manifest.buckets > 3
        self.version += 1
        return manifest


@pytest.fixture(params=["disk", "collective", "shared_device"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def sender(world: ModuleType, tiny: Path, transport: str, tmp_path: Path) -> Iterator[Sender]:
    made = Sender(world, tiny, transport, tmp_path / "weights")
    yield made
    made.publisher.close()


def test_a_swap_that_does_nothing_is_caught(sender: Sender, tiny: Path, transport: str) -> None:
    engines: list[Any] = []
    settings = EngineSettings(
        model_path=str(tiny), max_tokens=4, stop_token_ids=(1,), max_model_len=32
    )

    def make() -> TransformersEngine:
        engines.append(TransformersEngine(settings))
        return engines[0]

    receiver = make_receiver(transport, "cpu")
    worker = RolloutWorker(make, lambda ids: [""] * len(ids), receiver, None, WorkerSettings())
    worker.start()
    for _ in range(2):
        report = worker.load_weights(sender.publish())
        assert report.canary_logp_diff < 1e-4
        assert report.prove_s >= 0

    def nothing(version: int) -> None:
        engines[0].version = version

    engines[0].swap = nothing
    with pytest.raises(WeightMismatch, match="was to serve version 2, but"):
        worker.load_weights(sender.publish())
    worker.stop()
