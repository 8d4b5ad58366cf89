"""Rollout workers of a command that samples on this machine alone: processes without Ray."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from actors.serving import WorkerProcess, WorkerSpec, worker_name
from cluster.contracts.config.base import ClusterConfig
from cluster.contracts.config.rollout import RolloutConfig
from cluster.contracts.deadlines import within
from cluster.contracts.errors import AccordError, Retryable
from cluster.contracts.records import AS_TRAINED, Prompt, Rollout
from cluster.machine.hardware import this_machine
from cluster.machine.local_process import LocalProcess
from cluster.machine.ray_session import in_ray_cluster, ray_cluster

STOP_S = 5.0
CALL_S = 30.0  # over a call's own deadline: a machine under load
ALONE: dict[str, Any] = {"started": True, "software": None, "resources": {}}
"""What ``ray_cluster`` yields, where there is no Ray."""


@contextmanager
def sampling_cluster(cluster: ClusterConfig, rollout: RolloutConfig) -> Iterator[Mapping[str, Any]]:
    """As ``ray_cluster``. Ray is not started where processes of this machine are all that workers
    need: no cluster is joined, no GPU or other resource is shared out, no dashboard is wanted."""
    if in_ray_cluster() or not _alone(cluster, rollout):
        with ray_cluster(cluster) as info:
            yield info
        return
    yield dict(ALONE)


def _alone(cluster: ClusterConfig, rollout: RolloutConfig) -> bool:
    dashboard = "dashboard" in cluster.model_fields_set and cluster.dashboard
    wanted = rollout.gpus or rollout.resources or rollout.labels or dashboard
    return cluster.to_join is None and not wanted and not this_machine().gpus


class LocalWorker:
    """One rollout worker. A process that is gone, or does not answer in time, is Retryable."""

    def __init__(self, spec: WorkerSpec, index: int, cores: Sequence[int]) -> None:
        self.name = worker_name(index)
        self._limit = spec.start_timeout_s
        self._process = LocalProcess(
            self.name, WorkerProcess, replace(spec, cores=tuple(cores)), index, 0
        )

    async def start(self) -> Mapping[str, Any]:
        return dict(await self._call(self._limit, "start"))

    async def sample(
        self, prompts: Sequence[Prompt], samples: int, timeout_s: float
    ) -> list[Rollout]:
        words = (list(prompts), samples, timeout_s, AS_TRAINED)
        return list(await self._call(timeout_s + CALL_S, "sample", *words))

    async def stop(self) -> None:
        with suppress(AccordError):
            await self._call(STOP_S, "stop")
        self._process.end()

    async def _call(self, limit_s: float, method: str, *words: Any) -> Any:
        try:
            return await within(limit_s, self._process.call(method, *words))
        except TimeoutError:
            raise Retryable(f"{self.name} did not {method} within {limit_s:.0f} s") from None
