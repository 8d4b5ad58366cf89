"""The roles of a training run, made from its config."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cluster.assembly.prepare import Prepared, context_length
from cluster.assembly.reward_replicas import RewardReplicas, RewardRole
from cluster.assembly.shipping import RoleFiles
from cluster.contracts.actor_names import Names, unnamed
from cluster.contracts.config.reward import FunctionSource, RewardModelSource
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import BadReward, RewardsAway
from cluster.contracts.plugins import loaded
from cluster.contracts.protocols import Scorer
from cluster.loop.supervision import WINDOW_S
from cluster.machine.cores import CorePlan

START_S = 120.0  # for the reward service to load, once it has a place
WORKER_WAITS_S = 60.0
FOR_EVER_S = 1e9
STOP_S = 3.0  # for the reward service to answer what it is scoring


def worker_factory(
    prepared: Prepared,
    cores: CorePlan,
    make_scorer: Callable[..., Scorer],
    first_step: int,
    files: RoleFiles,
    names: Names = unnamed,
) -> Any:
    """(index, incarnation) -> worker, for the pool. ``first_step``: at which the run is resumed."""
    from actors.remote import make_worker_factory
    from actors.serving import worker_spec

    config = prepared.config
    spec = worker_spec(
        config,
        stop_ids=prepared.stop_ids,
        context=context_length(config.model),
        first_step=first_step,
        threads=cores.worker_threads,
        make_scorer=partial(make_scorer, prepared.tokenizer_fingerprint),
        plugins=loaded(),
        files=files.worker,
    )
    rollout = config.rollout
    return make_worker_factory(
        spec,
        num_cpus=rollout.cpus,
        num_gpus=rollout.gpus,
        cores=cores.worker,
        resources=rollout.resources,
        labels=rollout.labels,
        names=names,
    )


@contextmanager
def reward_role(
    config: TrainConfig, cores: CorePlan, log_file: Path, files: RoleFiles, names: Names = unnamed
) -> Iterator[RewardRole]:
    """The reward service that was given, or one that begins to start here for the run.

    What one started here prints goes to ``log_file``, from other machines, too; a BadReward raised
    within then names the file, and a RewardsAway says how often the service's process has died.

    A service elsewhere gets the token in the variable ACCORD_REWARD_TOKEN. One started here answers
    to a token made for this run. It listens on loopback; on a cluster that was joined, where
    workers may sit on other machines, on its node's address, encrypted with a certificate made for
    this run.
    """
    from reward_service.access import service_access, sources_access
    from reward_service.certificate import run_access
    from reward_service.remote import AddressBook, RewardClients, begin_reward_service

    deadline_s = config.reward.deadline_s
    if config.reward.address:  # it was reached before Ray was started
        given = RewardClients(config.reward.address, deadline_s, service_access(config.reward))
        yield RewardRole(given)
        return
    joined = config.cluster.to_join is not None
    own, theirs = run_access(encrypted=joined)
    book = AddressBook(secrets.token_hex(8))
    # On a cluster that may grow, a worker does not hold its place for as long as that may take.
    room_s = (config.cluster.room_timeout_s or FOR_EVER_S) if joined else 0.0
    patience_s = WORKER_WAITS_S if joined else math.inf

    def begin() -> Any:
        return begin_reward_service(
            config.reward,
            num_cpus=config.reward.cpus,
            cores=cores.reward,
            reach="cluster" if joined else "machine",
            access=own,
            remote=sources_access(config.reward),
            log_file=log_file,
            files=files.reward,
            timeout_s=START_S + room_s,
            names=names,
        )

    replicas = RewardReplicas(begin, config.reward.replicas, book.put)
    clients = RewardClients(replicas.first.place, deadline_s, theirs, book, patience_s)
    try:
        yield RewardRole(clients, replicas)
    except BadReward as problem:
        if log_file.is_file() and log_file.stat().st_size:
            raise BadReward(f"{problem}\n  log: {log_file}") from problem
        raise
    except RewardsAway as problem:
        if deaths := replicas.deaths():
            raise RewardsAway(f"{problem}{_died(deaths, log_file)}") from problem
        raise
    finally:
        replicas.stop(STOP_S)


def _died(deaths: Sequence[str], log_file: Path) -> str:
    times = "once" if len(deaths) == 1 else f"{len(deaths)} times"
    log = f"\n  log: {log_file}" if log_file.is_file() and log_file.stat().st_size else ""
    return (
        f"\n  cause: the reward service's process died {times} within the last "
        f"{WINDOW_S / 60:.0f} minutes; the last time: {deaths[-1]}"
        "\n  fix: mend the reward that ends its process: os._exit, a crash in native code, or more "
        f"memory than there is{log}"
    )


def parents(config: TrainConfig) -> dict[str, str]:
    """Lineage: which models, prompts and rewards this run grew from."""
    found = {"policy": config.model.path, "prompts": config.data.prompts, **config.run.parents}
    reference = config.learner.reference_path
    if reference not in (None, config.model.path):
        found["reference"] = str(reference)
    if config.reward.address:
        return found  # The service's sources score; the config's are not used.
    for source in config.reward.sources:
        if isinstance(source, RewardModelSource):
            found[f"reward/{source.name}"] = source.path
        elif isinstance(source, FunctionSource):
            found[f"reward/{source.name}"] = source.path.rpartition(":")[0] or source.path
    return found
