"""Several policies of one learner: LoRA adapters on one base, each trained as if it were alone.

A step trains the policies one after the other, each on its own rows, with an optimiser, a value
head and a KL coefficient of its own. So nothing that is computed over a batch (whitening, mean
losses, the limit of the gradient's norm) mixes two policies, and an adapter that is trained beside
another one gets the same numbers, bit for bit, as one that is trained alone on the same groups.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.contracts.errors import Fatal
from cluster.contracts.metrics import Metric, merge
from learner.models.lora import DEFAULT, adapter_names
from learner.rl.forward import Networks
from learner.rl.rollouts import RolloutBatch, read_batch
from learner.settings import LearnerSettings

_ADAPTER = "policy_"  # peft keeps adapters as attributes, so a name like "train" could not be one


def adapter_of(policy: str) -> str:
    """The name within the model of a policy's adapter; "": of the only policy of a run."""
    return f"{_ADAPTER}{policy}" if policy else DEFAULT


def policies_of(model: Any) -> list[str]:
    """Names of the policies whose adapters the model has; of a run with one policy: none."""
    names = adapter_names(model)
    return [name.removeprefix(_ADAPTER) for name in names if name.startswith(_ADAPTER)]


def networks_of_policies(networks: Networks, settings: LearnerSettings) -> dict[str, Networks]:
    """The same models as each policy uses them, with value heads of their own, by policy's name."""
    names = settings.policies or ("",)
    made = {}
    for place, name in enumerate(names):
        # Deep-copied before anything was trained: all heads start with the same numbers.
        value = networks.value if place == 0 else copy.deepcopy(networks.value)
        made[name] = replace(networks, adapter=adapter_of(name), value=value)
    return made


def by_policy(
    rollouts: RolloutBatch, names: Sequence[str], samples_per_prompt: int
) -> dict[str, RolloutBatch]:
    """Each policy's part of a step's rows; a policy without any is left out.

    Raises Fatal for rows of a policy that the learner does not have.
    """
    if list(names) == [""]:
        return {"": rollouts}
    owners = np.array(rollouts.table.column("policy").to_pylist(), dtype=object)
    if unknown := sorted(set(owners) - set(names)):
        raise Fatal(f"the step holds completions of {unknown}, the run has {sorted(names)}")
    parts = {}
    for name in names:
        rows = np.flatnonzero(owners == name)
        if len(rows):
            groups = sorted(set(rollouts.group_ids[rows].tolist()))
            table = rollouts.table.take(pa.array(rows))
            parts[name] = read_batch([table], groups, samples_per_prompt)
    return parts


def merged(found: Mapping[str, Iterable[Metric]]) -> list[Metric]:
    """Metrics of the whole step: those of all policies merged, and each policy's own under
    ``policies/NAME/``. Numbers that do not merge are averaged (standard deviations, coefficients).
    """
    if list(found) == [""]:
        return list(found[""])
    every = [
        replace(metric, kind="mean") if metric.kind == "last" else metric
        for metrics in found.values()
        for metric in metrics
    ]
    own = [
        replace(metric, name=f"policies/{name}/{metric.name}")
        for name, metrics in found.items()
        for metric in merge(metrics).values()
    ]
    return [*merge(every).values(), *own]
