"""Which device a role computes on, on how many cores, and what the cluster has to offer them."""

from __future__ import annotations

import math
from typing import Any

from cluster.assembly.auto.choices import WIDTH, Choices, Load, counted, millions, size_of
from cluster.assembly.model_facts import ModelFacts
from cluster.contracts.config.rollout import RolloutConfig
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.devices import ENGINE_CORES
from cluster.machine.hardware import MB, Machine

SMALL = 50_000_000  # parameters; below, a second core makes decoding slower (measured up to 16 M)
MOST_CORES = ENGINE_CORES.cpu
SMALL_LEARNER_CORES = 8
# Parameters from which, on a machine with two cores, the learner computes on both: forward and
# backward take several times generation's arithmetic. Smaller products gain nothing from a core
# that they have to share. With more cores nobody has measured it.
SHARING = 4_500_000
SHARED_CORES = 2
MANY_CORES = 4  # beside the workers; with fewer, the other processes share the learner's
OBJECT_STORE_LEAST_MB = 256
DASHBOARD_CORES = 4  # on two, it delayed the first step by a seventh (docs/operate.md)
VERSIONS = 3  # of the weights, on their way at once at most


def choose_gpus(choices: Choices[TrainConfig]) -> None:
    config = choices.config
    services = 0 if config.reward.address else config.reward.replicas
    count = max(0, choices.machine.gpus - math.floor(services * config.reward.gpus))
    workers, processes = config.rollout.workers, config.learner.processes
    each = config.rollout.tensor_parallel
    wanted = workers * each + processes
    if not count:
        why = "no GPU here that the installed torch can use"
        if config.cluster.to_join is not None:
            why += "; set it where other machines of the cluster have GPUs"
        choices.settle("learner.gpus", 0.0, why)
        choices.settle("rollout.gpus", 0.0, why)
    elif count == 1 and each == processes == 1:
        set_by_user = "gpus" in config.rollout.model_fields_set
        left = max(0.0, 1.0 - workers * config.rollout.gpus) if set_by_user else 0.5
        choices.settle("learner.gpus", left, "learner and workers share the only GPU")
        rest = 1.0 - choices.config.learner.gpus
        share = math.floor(10_000 * rest / workers) / 10_000  # Ray counts in ten-thousandths
        choices.settle("rollout.gpus", share, f"what the learner leaves, for {counted(workers)}")
    elif count >= wanted or each > 1 or count <= processes:
        why = f"one for each process; {wanted} of {counted(count, 'GPU')}"
        choices.settle("learner.gpus", 1.0, why)
        choices.settle("rollout.gpus", float(each), why)
    else:
        choices.settle("learner.gpus", 1.0, f"one for each process, of {count} GPUs")
        together = math.ceil(workers / (count - processes))
        share = math.floor(10_000 / together) / 10_000
        choices.settle(
            "rollout.gpus", share, f"{counted(workers)} share the {count - processes} GPUs left"
        )


def choose_gpus_alone(choices: Choices[Any], engines: int) -> None:
    """GPUs of engines beside which nothing else computes."""
    count, each = choices.machine.gpus, choices.config.rollout.tensor_parallel
    if not count:
        choices.settle("rollout.gpus", 0.0, "no GPU here that the installed torch can use")
    elif count >= engines * each or each > 1:
        choices.settle("rollout.gpus", float(each), "one for each worker")
    else:
        share = math.floor(10_000 / math.ceil(engines / count)) / 10_000
        choices.settle("rollout.gpus", share, f"{counted(engines)} share {counted(count, 'GPU')}")


def choose_worker_cores(choices: Choices[Any], model: ModelFacts | None, load: Load) -> None:
    cores, size = choices.machine.cores, size_of(model)
    if choices.config.rollout.gpus:
        choices.settle(
            "rollout.cpus", float(ENGINE_CORES.cuda), "the engine's thread waits for its GPU"
        )
    elif load.engines >= cores:
        choices.settle("rollout.cpus", 1.0, f"{counted(cores, 'core')} for {counted(load.engines)}")
    elif size < SMALL:
        why = f"a model of {millions(size)} parameters decodes no faster on several cores"
        choices.settle("rollout.cpus", 1.0, why)
    else:
        shared = cores if load.alone else cores // 2
        own = min(MOST_CORES, max(1, shared // load.engines))
        why = f"{shared} of {cores} cores, for {counted(load.engines)}, at most {MOST_CORES} each"
        choices.settle("rollout.cpus", float(own), why + _alike(choices.config))


def choose_learner_cores(choices: Choices[TrainConfig], model: ModelFacts | None) -> None:
    config, cores, size = choices.config, choices.machine.cores, size_of(model)
    if config.learner.gpus:
        choices.settle("learner.cpus", 1.0, "the learner waits for its GPU")
        return
    taken = 0.0 if config.rollout.gpus else config.rollout.workers * config.rollout.cpus
    if _shares_cores(choices, taken, size):
        why = f"a model of {millions(size)} parameters: the learner's products take all cores"
        choices.settle("learner.cpus", float(cores), f"{why}, and workers what it leaves")
        return
    rest, why = cores - taken, f"the cores beside {counted(config.rollout.workers)}"
    if rest >= MANY_CORES:
        rest, why = rest - 1, f"{why}, less one for the reward service and the controller"
    left = max(1, int(rest / config.learner.processes))
    if size < SMALL and left > SMALL_LEARNER_CORES:
        left = SMALL_LEARNER_CORES
        why = f"enough for a model of {millions(size)} parameters"
    choices.settle("learner.cpus", float(left), why + _alike(config))


def _shares_cores(choices: Choices[TrainConfig], taken: float, size: int) -> bool:
    config, cores = choices.config, choices.machine.cores
    if config.cluster.to_join is not None or config.rollout.gpus or config.learner.processes > 1:
        return False
    pinned = choices.is_set("cluster.pin_cores") and config.cluster.pin_cores
    return taken < cores == SHARED_CORES and size >= SHARING and not pinned


def _alike(config: Any) -> str:
    """What is assumed of a cluster that was joined: Ray knows its machines only once it runs."""
    cluster = getattr(config, "cluster", None)
    joined = cluster is not None and cluster.to_join is not None
    return "; the cluster's machines are taken to be like this one" if joined else ""


def choose_cluster(choices: Choices[Any], model: ModelFacts | None) -> None:
    config, machine = choices.config, choices.machine
    rollout, learner = config.rollout, getattr(config, "learner", None)
    joined = config.cluster.to_join is not None
    trained = learner.processes * learner.cpus if learner is not None else 0.0
    reward: Any = getattr(config, "reward", None)
    scored = 1 if reward is None else reward.replicas * reward.cpus
    most = rollout.workers + 2  # room for two workers that `accord scale` may add
    asked = most * rollout.cpus + trained + scored
    choices.settle("cluster.pin_cores", *_pinned(config, machine, joined))
    if joined:
        other = "not used: the cluster was started by somebody else"
        choices.settle("cluster.num_cpus", None, other)
        choices.settle("cluster.object_store_mb", OBJECT_STORE_LEAST_MB, other)
        choices.settle("cluster.dashboard", False, other)
        return
    slots = max(8, machine.cores, math.ceil(asked))
    why = f"one per core ({machine.cores}), at least 8, room for all roles"
    choices.settle("cluster.num_cpus", slots, why)
    choices.settle("cluster.object_store_mb", *_object_store(rollout, machine, model))
    choices.settle("cluster.dashboard", *_dashboard(machine, trains=learner is not None))


def _dashboard(machine: Machine, *, trains: bool) -> tuple[bool, str]:
    if not trains:
        return False, "only a training run has a page in it"
    if machine.cores < DASHBOARD_CORES:
        return False, f"its ten processes would delay the start on {counted(machine.cores, 'core')}"
    return True, f"{machine.cores} cores, at least {DASHBOARD_CORES}"


def _pinned(config: Any, machine: Machine, joined: bool) -> tuple[bool, str]:
    if joined:
        return False, "the cluster's machines are not ours alone"
    if config.rollout.gpus:
        return False, "the workers compute on a GPU"
    if config.rollout.workers >= machine.cores:
        return False, f"{counted(machine.cores, 'core')} for {counted(config.rollout.workers)}"
    learner = getattr(config, "learner", None)
    left = machine.cores - config.rollout.workers * config.rollout.cpus
    asked = 0 if learner is None or learner.gpus or learner.processes > 1 else learner.cpus
    if asked > max(1, left):
        return False, "the learner computes on the workers' cores, too"
    return True, "enough cores for one per worker and one for the learner"


def _object_store(
    rollout: RolloutConfig, machine: Machine, model: ModelFacts | None
) -> tuple[int, str]:
    if model is None:
        return OBJECT_STORE_LEAST_MB, "the model's config cannot be read"
    weights = VERSIONS * model.parameters * WIDTH[rollout.dtype] / MB
    needed, room = math.ceil(1.2 * weights) + 64, int(0.8 * machine.shared_memory_mb)
    if needed <= OBJECT_STORE_LEAST_MB:
        return OBJECT_STORE_LEAST_MB, "more than three versions of the weights take"
    if needed > room >= OBJECT_STORE_LEAST_MB:
        return room, (
            f"80 % of the shared memory; three versions of the weights take {weights:.0f} MiB, "
            "and weights.transport = 'disk' needs no room here"
        )
    return needed, f"three versions of the weights take {weights:.0f} MiB"
