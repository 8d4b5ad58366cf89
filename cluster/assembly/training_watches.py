"""What goes on beside the loop of a training run, for as long as it trains: the live view, the
reward services, room on the cluster, nodes that leave, Ray's head, and a run that stands still."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from cluster.assembly.head_watch import HeadWatch, watch_head
from cluster.assembly.leaving import LeavingWatch
from cluster.assembly.reward_replicas import RewardRole
from cluster.assembly.room import keep_room
from cluster.assembly.run_session import RunSession
from cluster.assembly.stall_watch import StallWatch, own_deadlines, processes
from cluster.assembly.training_record import Training
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import AccordError
from cluster.contracts.protocols import Clock
from cluster.loop.controller import Controller
from cluster.loop.live import LiveMeter
from cluster.loop.live_feed import LiveFeed, Show
from cluster.loop.pool import WorkerPool
from cluster.machine.draining import LeavingNode
from cluster.runs.live_file import LiveFile
from cluster.runs.sinks import RayLiveGauges


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningRoles:
    """The roles of a run, put together, and what shows them."""

    controller: Controller
    pool: WorkerPool
    learner: Any
    rewards: RewardRole
    feed: LiveFeed
    clock: Clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Watches:
    """``reward``: ends by itself when no reward service can work any more; it then raises why."""

    head: HeadWatch
    reward: asyncio.Future[None]


@asynccontextmanager
async def watched(training: Training, roles: RunningRoles) -> AsyncIterator[Watches]:
    config, session = training.config, training.session
    head = watch_head(session, roles.controller)
    reward = asyncio.ensure_future(
        _watch_reward_service(config, roles.rewards, session, roles.controller)
    )
    others = [
        asyncio.ensure_future(keep_room(config, session, lambda: roles.pool.wanted)),
        asyncio.ensure_future(_watch_leaving_nodes(training, roles)),
        asyncio.ensure_future(roles.feed.run()),
        asyncio.ensure_future(head.run()),
        asyncio.ensure_future(_stall_watch(training, roles).run()),
    ]
    try:
        yield Watches(head=head, reward=reward)
    finally:
        for watch in (reward, *others):
            watch.cancel()
        # Some have a last thing to do: the live view shows the end, machines are given back.
        await asyncio.gather(reward, *others, return_exceptions=True)


def _stall_watch(training: Training, roles: RunningRoles) -> StallWatch:
    config, session, replicas = training.config, training.session, roles.rewards.replicas
    return StallWatch(
        timeout_s=config.cluster.stall_timeout_s,
        own=own_deadlines(config),
        folder=session.path,
        loop=roles.controller.facts,
        pool=roles.pool.facts,
        look=roles.feed.look,
        processes=lambda: processes(
            roles.learner, roles.pool.handles(), replicas.services if replicas else ()
        ),
        event=session.event,
        end=roles.controller.end,
        clock=roles.clock,
    )


def live_feed(
    training: Training, controller: Controller, pool: WorkerPool, learner: Any, clock: Clock
) -> LiveFeed:
    """Shows the run while it goes on: to `accord status` and the pages, and to Ray's metrics."""
    session = training.session
    shows: list[Show] = [LiveFile(session.path), *session.shows]
    if training.config.logging.ray_metrics:
        shows.append(RayLiveGauges(session.path.name))
    return LiveFeed(
        LiveMeter(session.path.name, addresses=session.addresses),
        controller.facts,
        pool.facts,
        shows,
        clock,
        session.event,
        learner.pulse,
    )


async def _watch_leaving_nodes(training: Training, roles: RunningRoles) -> None:
    """What a node that is about to go would take with it is passed on or saved before."""
    session, replicas = training.session, roles.rewards.replicas
    if training.config.cluster.to_join is None:
        return  # the only node is this machine

    def home(node: LeavingNode) -> list[str]:
        scores = replicas is not None and replicas.runs_at(node.address)
        there = ["learner"] * (node.id in roles.learner.nodes) + ["reward service"] * scores
        if there:
            session.reporter.say(
                f"node {node.name} is about to go, with {' and '.join(there)}: a checkpoint is "
                "written after the step under way"
            )
        return there

    watch = LeavingWatch(roles.pool, session.event, home, roles.controller.request_checkpoint)
    await watch.run()


async def _watch_reward_service(
    config: TrainConfig, rewards: RewardRole, session: RunSession, controller: Controller
) -> None:
    """Notes when the services have started, and starts one again when it dies. Where one cannot
    work any more, ends the run, with a checkpoint, and raises why."""
    replicas = rewards.replicas
    if replicas is None:  # elsewhere: they are not seen from here
        why = "rewards come from the service at reward.address, which the run did not start"
        controller.on_reward_replicas(
            lambda wanted: session.event("reward_replicas", wanted=wanted, serving=1, cause=why)
        )
        return
    try:
        await replicas.ready()
    except AccordError:
        if config.cluster.to_join is None:
            return  # raised by the workers, which need the service to start
        controller.request_stop()  # they would wait for as long as there may be room some day
        raise
    session.start.ends("reward service")
    controller.on_reward_replicas(replicas.scale)
    try:
        await replicas.keep_up(session.event)
    except AccordError:
        controller.request_stop()
        raise
