"""`accord plan`: the resolved config and the numbers that follow from it."""

from __future__ import annotations

import json
from typing import Any

from cluster.contracts.config import TrainConfig
from cluster.contracts.configfile import dump_toml
from cluster.placement import own_cores, plan_cores
from cluster.progress import result


def show_plan(config: TrainConfig, as_json: bool) -> None:
    numbers = derived(config)
    if as_json:
        result(json.dumps({"config": config.model_dump(mode="json"), "derived": numbers}))
        return
    result(dump_toml(config))
    result("# derived")
    for name, value in numbers.items():
        result(f"#   {name} = {value}")


def derived(config: TrainConfig) -> dict[str, Any]:
    batch, rollout, bound = config.batch, config.rollout, config.staleness.bound
    samples = batch.prompts_per_step * batch.samples_per_prompt
    cores = plan_cores(own_cores(), rollout.workers, pin=config.cluster.pin_cores)
    slots = rollout.workers * rollout.max_running
    return {
        "samples per step": samples,
        "samples of the whole run": samples * batch.steps,
        "answer tokens per step, at most": samples * rollout.max_tokens,
        "groups in flight, at most": (bound + 1) * batch.prompts_per_step,
        "samples decoded at once, at most": slots,
        # Little's law: S samples in flight, batches of B: so many steps of lag keep both busy.
        "staleness bound that keeps both sides busy": -(-slots // samples) + 1,
        "optimiser steps per learner step": config.learner.epochs * config.learner.minibatches,
        "cores of rollout workers": [list(c) for c in cores.workers] or "not pinned",
        "cores of the learner and scoring": list(cores.learner) or "not pinned",
    }
