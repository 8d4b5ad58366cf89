"""The roles of a training run, made from its config."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from actors.settings import engine_settings
from cluster.assembly.prepare import Prepared, context_length
from cluster.assembly.rewards import reward_token
from cluster.contracts.config.reward import RewardModelSource
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.plugins import loaded
from cluster.contracts.records import RunState
from cluster.machine.cores import CorePlan

STOP_S = 3.0  # for the reward service to answer what it is scoring


def worker_factory(
    prepared: Prepared, cores: CorePlan, addresses: RewardAddresses, state: RunState | None
) -> Any:
    from actors.remote import WorkerSpec, make_worker_factory

    config = prepared.config
    rollout = config.rollout
    spec = WorkerSpec(
        engine=engine_settings(
            config.model,
            rollout,
            prepared.stop_ids,
            config.data.max_prompt_tokens,
            context_length(config.model),
        ),
        kind=rollout.engine,
        seed=_sampling_seed(config, state),
        per_request_seeds=rollout.request_seeds,
        transport=config.weights.transport,
        make_scorer=_ClientMaker(
            addresses, config.reward.deadline_s, prepared.tokenizer_fingerprint
        ),
        start_timeout_s=rollout.start_timeout_s,
        weights_timeout_s=config.weights.timeout_s,
        score_batch=config.reward.max_batch,
        threads=cores.worker_threads,
        plugins=loaded(),
    )
    return make_worker_factory(
        spec, num_cpus=rollout.cpus, num_gpus=rollout.gpus, cores=cores.worker
    )


def _sampling_seed(config: TrainConfig, state: RunState | None) -> int:
    """A worker's stream begins anew on resume, so it needs another seed there; a sample's own
    randomness does not: a repeated step then repeats what it sampled."""
    resumed_at = state.step if state and not config.rollout.request_seeds else 0
    return config.run.seed + resumed_at


@dataclass(frozen=True, slots=True)
class RewardAddresses:
    """Where rewards are served, and the bearer token for it (kept out of every repr and log)."""

    addresses: tuple[str, ...]
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class _ClientMaker:
    """Makes the reward client in the worker's process."""

    addresses: RewardAddresses
    deadline_s: float
    tokenizer: str

    def __call__(self) -> Any:
        from reward_service.client import RewardClient

        client = RewardClient(
            self.addresses.addresses,
            deadline_s=self.deadline_s,
            token=self.addresses.token,
            tokenizer=self.tokenizer,
        )
        client.connect()
        return client


@contextmanager
def reward_addresses(config: TrainConfig, cores: CorePlan) -> Iterator[RewardAddresses]:
    """The reward service that was given, or one started here for the run.

    A service elsewhere gets the token in the variable ACCORD_REWARD_TOKEN. One started here listens
    on loopback; on a cluster that was joined, where workers may sit on other machines, on its
    node's address with a token made for this run.
    """
    if config.reward.address:
        from reward_service.client import RewardClient

        token = reward_token()
        client = RewardClient([config.reward.address], token=token)
        client.connect()
        client.close()
        yield RewardAddresses((config.reward.address,), token)
        return
    from reward_service.remote import start_reward_service

    joined = config.cluster.address is not None
    token = secrets.token_urlsafe(32) if joined else None
    service = start_reward_service(
        config.reward,
        num_cpus=1,
        cores=cores.reward,
        reach="cluster" if joined else "machine",
        token=token,
    )
    try:
        yield RewardAddresses((service.address,), token)
    finally:
        service.stop(STOP_S)


def parents(config: TrainConfig) -> dict[str, str]:
    """Lineage: which models this run grew from."""
    found = {"policy": config.model.path, **config.run.parents}
    for source in config.reward.sources:
        if isinstance(source, RewardModelSource):
            found[f"reward/{source.name}"] = source.path
    return found
