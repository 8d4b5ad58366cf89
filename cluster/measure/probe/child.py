"""Each role of a training run by itself for some seconds; a process each (``probe.py`` starts it).

    python -m cluster.measure.probe.child '{"role": "engine", "config": {...}, "folder": "..."}'

The engine samples real answers to the run's prompts, the reward service scores them, and the
learner trains on them: each writes its part into the folder for the next.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.contracts.config.train import TrainConfig
from cluster.contracts.rollout_table import from_table
from cluster.measure.bench.children import answer
from cluster.measure.probe.engine import ANSWERS, probe_engine, read_groups, write_groups
from cluster.weights.update import Update

GROUPS = "groups.arrow"
LEARNER_STEPS, LEARNER_S = 4, 25.0


def measure(task: dict[str, Any]) -> dict[str, Any]:
    config = TrainConfig.model_validate(task["config"])
    cores = tuple(task["cores"])
    if cores:
        os.sched_setaffinity(0, set(cores))
    roles = {"engine": probe_engine, "reward": probe_reward, "learner": probe_learner}
    return roles[task["role"]](config, Path(task["folder"]), task["threads"])


# -- rewards ---------------------------------------------------------------------------------------


def probe_reward(config: TrainConfig, folder: Path, threads: int) -> dict[str, Any]:
    """Scores a step's samples as workers ask for it, a few groups a call."""
    from reward_service.access import OPEN, service_access
    from reward_service.client import RewardClient
    from reward_service.server import serve

    groups = from_table(read_groups(folder / ANSWERS))
    rollouts = [rollout for group in groups for rollout, _ in group.samples]
    size = min(config.reward.max_batch, config.batch.samples_per_prompt)
    server = None if config.reward.address else serve(config.reward)
    address = config.reward.address or (server.address if server else "")
    client = RewardClient(
        [address],
        deadline_s=config.reward.deadline_s,
        access=service_access(config.reward) if config.reward.address else OPEN,
    )
    client.connect()
    client.score(rollouts[:size])  # the first call is slower than all others
    began, cpu_began = time.perf_counter(), time.process_time()
    scores = client.score(rollouts)
    whole_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    latencies = []
    for start in range(0, min(len(rollouts), 8 * size), size):
        began = time.perf_counter()
        client.score(rollouts[start : start + size])
        latencies.append(time.perf_counter() - began)
    client.close()
    if server is not None:
        server.stop()
    scored = iter(zip(rollouts, scores, strict=True))
    write_groups(
        folder / GROUPS,
        [replace(group, samples=tuple(next(scored) for _ in group.samples)) for group in groups],
    )
    return {
        "score_s": statistics.median(latencies),
        "scoring_s": whole_s,
        "scoring_cpu_s": 0.0 if config.reward.address else cpu_s,  # a service elsewhere costs none
    }


# -- learner ---------------------------------------------------------------------------------------


class _Nowhere:
    """A publisher that does a sender's work (checksums, a copy) and sends nothing.

    on_device: as every transport between processes on a CPU, it takes host arrays.
    """

    on_device = False
    nbytes = 0

    def open(self, version: int) -> Update:
        self.nbytes = 0
        return Update(version, "none", self)

    def put(self, arrays: Mapping[str, Any]) -> None:
        for array in arrays.values():
            self.nbytes += len(array.tobytes())

    def finish(self) -> None:
        """Nowhere."""

    def discard(self) -> None:
        """Nothing is held."""

    def retain(self, versions: Collection[int]) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""


def probe_learner(config: TrainConfig, folder: Path, threads: int) -> dict[str, Any]:
    """Learner steps on what was sampled and scored. The first, which warms up, does not count."""
    from cluster.contracts.records import StepInput
    from learner.rl.learner import PPOLearner
    from learner.settings import learner_settings

    table = read_groups(folder / GROUPS)
    ids = tuple(range(config.batch.prompts_per_step))
    # Any answer will do at any step: the bound is about what they teach, not about the time.
    staleness = config.staleness.model_copy(update={"bound": LEARNER_STEPS})
    config = config.model_copy(update={"staleness": staleness})
    first = from_table(table)[0].samples[0][0].prompt
    settings = learner_settings(config, canary_prompt=tuple(first.token_ids), run_dir=None)
    publisher = _Nowhere()
    learner = PPOLearner(settings, publisher, threads=threads)
    learner.start()
    steps: list[float] = []
    cpu: list[float] = []
    published: list[float] = []
    while len(steps) < 2 or (len(steps) < LEARNER_STEPS and sum(steps) < LEARNER_S):
        began, cpu_began = time.perf_counter(), time.process_time()
        result = learner.step(StepInput(step=len(steps), group_ids=ids, payloads=(table,)))
        steps.append(time.perf_counter() - began)
        cpu.append(time.process_time() - cpu_began)
        published += [m.value for m in result.metrics if m.name == "time/publish"]
    learner.close()
    return {
        "learn_s": statistics.median(steps[1:]),
        "learn_cpu_s": statistics.median(cpu[1:]),
        "cpu_share": sum(cpu[1:]) / sum(steps[1:]),
        "publish_s": statistics.median(published or [0.0]),
        "weights_bytes": publisher.nbytes,
        "peak_rss_bytes": _peak_rss(),
    }


def _peak_rss() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    answer(measure)
