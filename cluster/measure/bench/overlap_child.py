"""The children of `accord bench overlap`: a whole run, generation alone, the learner alone."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from cluster.contracts.config.file import load_config
from cluster.measure.bench.children import answer, timed
from cluster.weights.update import Nowhere, Update

CORE_OF = {"generate": 0, "learn": 1}
SKIPPED = 2  # of the learner's steps: its first batches set up kernels and memory


def work(task: dict[str, Any]) -> dict[str, Any]:
    return {"train": train, "generate": generate, "learn": learn}[task["kind"]](task)


def train(task: dict[str, Any]) -> dict[str, Any]:
    """`accord train`, on the cores of its plan or, colocated, with all cores for every role."""
    from cluster.assembly.training import train_policy
    from cluster.contracts.config.train import TrainConfig
    from cluster.machine.cores import CorePlan, own_cores
    from cluster.runs.console import Reporter

    config = load_config(TrainConfig, task["config"])
    cores = None
    if task["mode"] == "colocated":
        everywhere = tuple(own_cores())
        cores = CorePlan(
            tuple((core,) for core in everywhere),
            everywhere,
            (),
            learner_threads=len(everywhere),
        )
    return {"run": str(train_policy(config, Reporter(quiet=True), cores=cores))}


def generate(task: dict[str, Any]) -> dict[str, Any]:
    """The recorded prompts through the worker's engine alone, with the lengths of the run."""
    from actors.environment import prepare_environment

    prepare_environment((CORE_OF["generate"],))
    from actors.settings import engine_settings
    from cluster.assembly.prepare import context_length
    from cluster.contracts.config.train import TrainConfig
    from cluster.measure.bench.plain_vllm import generate as answers
    from cluster.measure.bench.plain_vllm import worker_engine

    config = load_config(TrainConfig, task["config"])
    settings = engine_settings(
        config.model,
        config.rollout,
        (),
        config.data.max_prompt_tokens,
        context_length(config.model),
    )
    engine = worker_engine(settings)
    requests = [
        (row["prompt_ids"], len(row["token_ids"]))
        for table in _tables(task)
        for row in table.select(["prompt_ids", "token_ids"]).to_pylist()
    ]
    answers(engine, requests[: settings.max_running], "warm")
    return timed(lambda: answers(engine, requests, "run")) | {"steps": task["steps"]}


def learn(task: dict[str, Any]) -> dict[str, Any]:
    """The recorded rollouts through the learner, without publishing."""
    os.sched_setaffinity(0, {CORE_OF["learn"]})
    from cluster.contracts.config.train import TrainConfig
    from cluster.contracts.metrics import values
    from cluster.contracts.records import StepInput
    from learner.rl.learner import PPOLearner
    from learner.settings import learner_settings

    config = load_config(TrainConfig, task["config"])
    tables = _tables(task)
    canary = tuple(tables[0].column("prompt_ids")[0].as_py())
    learner = PPOLearner(learner_settings(config, canary, None), publisher=_Nowhere(), threads=1)
    learner.start()
    sums = {"tokens": 0.0, "wall_s": 0.0, "cpu_s": 0.0}
    for step, table in enumerate(tables):
        groups = tuple(sorted(set(table.column("group_id").to_pylist())))
        wall, cpu = time.perf_counter(), time.process_time()
        result = learner.step(StepInput(step=step, group_ids=groups, payloads=(table,)))
        spent = time.perf_counter() - wall, time.process_time() - cpu
        if step >= SKIPPED:
            publishing = values(result.metrics)["time/publish"]
            sums["tokens"] += result.trained_tokens
            sums["wall_s"] += spent[0] - publishing
            sums["cpu_s"] += spent[1] - publishing
    return sums | {"steps": len(tables) - SKIPPED}


class _Nowhere:
    """A publisher that only says what it was given: sending weights is not the learner's work."""

    on_device = False

    def open(self, version: int) -> Update:
        return Update(version, "none", Nowhere())

    def retain(self, versions: Collection[int]) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""


def _tables(task: Mapping[str, Any]) -> list[Any]:
    """The first steps' rollouts, in order: a learner can only take them from the first on."""
    import pyarrow.parquet as pq

    files = sorted((Path(task["run"]) / "rollouts").glob("step-*.parquet"))[: task["steps"]]
    return [pq.read_table(file) for file in files]


if __name__ == "__main__":
    answer(work)
