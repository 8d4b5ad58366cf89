"""The roles' processes as copies of one whose imports are done, so that they start at once."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

from cluster.contracts.config.base import ClusterConfig
from cluster.machine.fork_server import fork_server
from cluster.machine.hardware import this_machine

WORKER = ("actors.rollout",)
TRAINING = ("learner.rl.learner", "reward_service.server", *WORKER)
ENGINE = ("actors.engines.vllm_engine", "actors.engines.vllm_multistep")


def forked_roles(
    cluster: ClusterConfig,
    purpose: Literal["training", "sampling"] = "training",
    *,
    compiled: bool = False,
) -> AbstractContextManager[None]:
    """To be entered before anything else that takes time: the imports begin here. Within another
    one, that one's process serves.

    Not on a cluster that is joined (its hosts import for themselves), not on a machine with GPUs
    (a CUDA context does not survive a fork), and not for a ``compiled`` learner (on CPUs the engine
    switches torch's compiler off, and that is settled by the import).
    """
    if cluster.to_join is not None or compiled or this_machine().gpus:
        return nullcontext()
    from actors.environment import engine_variables, vllm_available

    modules = TRAINING if purpose == "training" else WORKER
    engine = ENGINE if vllm_available() else ()
    threads = {"OMP_NUM_THREADS": "1"}  # each role sets its own number
    return fork_server((*modules, *engine), {**engine_variables(gpu=False), **threads})
