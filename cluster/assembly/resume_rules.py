"""Which settings of a run may change on a resume, and why not the others."""

from __future__ import annotations

from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import UserError

FREE_ON_RESUME = (
    # Whole sections: what is shown and kept, and where things run.
    *("logging", "monitors", "cluster", "checkpoint", "weights"),
    # Addresses, deadlines and places of the rewards; what scores stays the same.
    *("reward.address", "reward.tls", "reward.deadline_s", "reward.outage_s", "reward.max_batch"),
    *(
        "reward.max_wait_ms",
        "reward.replicas",
        "reward.cpus",
        "reward.gpus",
        "reward.resources",
        "reward.labels",
    ),
    # How many workers, where, how fast; each samples from the same distribution.
    *("rollout.workers", "rollout.cpus", "rollout.gpus", "rollout.resources", "rollout.labels"),
    *("rollout.min_workers", "rollout.workers_timeout_s", "rollout.autoscale"),
    "rollout.max_workers",
    *("rollout.max_restarts", "rollout.start_timeout_s", "rollout.stall_timeout_s"),
    "rollout.request_timeout_s",
    *("rollout.max_running", "rollout.kv_cache_mb", "rollout.gpu_memory_fraction"),
    *("rollout.block_size", "rollout.tensor_parallel"),
    # When the policy is evaluated, and what follows; what with and by whom stays the same.
    *("evaluation.every", "evaluation.timeout_s", "evaluation.keep_best", "evaluation.result"),
    *("evaluation.patience", "evaluation.min_improvement"),
    # How a step is computed: the gradient is the same up to the order of its sums.
    *("learner.processes", "learner.sharding", "learner.tokens_per_microbatch"),
    *("learner.packing", "learner.activation_memory_mb", "learner.gradient_checkpointing"),
    *("learner.tensor_parallel", "learner.sequence_parallel", "learner.offload"),
    *("learner.reshard_after_forward", "learner.prefetch_layers", "learner.gradient_reduction"),
    *("learner.compile", "learner.cpus", "learner.gpus", "learner.resources", "learner.labels"),
    *("learner.start_timeout_s", "learner.step_timeout_s", "learner.max_restarts"),
    # Free where no schedule ends with it: `refuse_other_horizon`.
    "batch.steps",
)
"""Sections, and ``section.key``, that do not change what is learnt."""

MOVABLE = ("data.prompts", "evaluation.prompts", "model.path", "learner.reference_path")
"""Free where the run has noted what was there: `learnt_from` compares the content."""


def refuse_other_horizon(before: TrainConfig, after: TrainConfig, path: str) -> None:
    """Raise UserError where another number of steps would change the learning rate of all steps."""
    schedule = before.learner.schedule
    if schedule != "constant" and before.batch.steps != after.batch.steps:
        raise UserError(
            f"batch.steps cannot change from {before.batch.steps} to {after.batch.steps}: the "
            f"learning rate of this run falls to 0 at its last step (learner.schedule = "
            f"{schedule!r}), so that it would jump now",
            where=path,
            fix="start a new run from the policy of this one, or leave batch.steps out",
        )
