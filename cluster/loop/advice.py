"""From what a run waited for to the name of its bottleneck and the advice that follows. Pure."""

from __future__ import annotations

from cluster.contracts.live import STAGES, Bottleneck, LiveView

IDLE = 0.5  # workers that decode less than this share of their time have room for more


def bottleneck(view: LiveView) -> Bottleneck:
    """The stage that the run waited for most in the last minute (``view.bottleneck.shares``), why,
    and what helps. A learner that does not answer comes first: the run waits for nothing else."""
    shares = view.bottleneck.shares
    if view.learner.silent:
        age = view.learner.heartbeat_age_s
        return Bottleneck(
            stage="learner",
            shares=shares,
            why=f"The learner has not answered for {age:.0f} s.",
            advice="See whether its process or host is stopped, overloaded or cut off.",
        )
    if not shares:
        return Bottleneck(shares=shares, why=_starting(view))
    stage = max(STAGES, key=lambda name: shares.get(name, 0.0))
    why, advice = {
        "learner": _learner,
        "rollout": _rollout,
        "reward": _reward,
        "weights": _weights,
    }[stage](view)
    share = f"{shares[stage]:.0%} of the last minute"
    return Bottleneck(stage=stage, shares=shares, why=f"{why} ({share}).", advice=advice)


def _starting(view: LiveView) -> str:
    waits = [worker.name for worker in view.workers if worker.status == "starting"]
    if view.learner.state == "starting":
        waits.insert(0, "the learner")
    return f"Starting: {', '.join(waits)}." if waits else "Starting."


def _learner(view: LiveView) -> tuple[str, str]:
    serving = [worker for worker in view.workers if worker.status == "serving"]
    busy = sum(worker.busy for worker in serving) / max(1, len(serving))
    advice = "Give the learner more: learner.cpus, learner.gpus or learner.processes."
    if len(serving) > 1 and busy < IDLE:
        advice += (
            f" The workers decode only {busy:.0%} of their time, so fewer would do: "
            f"accord scale {view.run} {len(serving) - 1}."
        )
    return "Workers wait while the learner trains", advice


def _rollout(view: LiveView) -> tuple[str, str]:
    silent = [worker for worker in view.workers if worker.silent]
    if silent:
        ages = ", ".join(f"{w.name} for {w.heartbeat_age_s or 0:.0f} s" for w in silent)
        return (
            f"Workers do not answer: {ages}",
            "They are replaced after rollout.stall_timeout_s. See whether their hosts are stopped.",
        )
    serving = view.workers_by_status.get("serving", 0)
    starting = view.workers_by_status.get("starting", 0)
    if not serving:
        return (
            f"No worker serves, {starting} are starting" if starting else "There are no workers",
            "Wait for them." if starting else f"Ask for some: accord scale {view.run} 1.",
        )
    advice = f"Add workers: accord scale {view.run} {serving + starting + 1}."
    if view.staleness.bound == 0:
        advice += " With staleness.bound=1 workers also generate while the learner trains."
    return "The learner waits for completions", advice


def _reward(view: LiveView) -> tuple[str, str]:
    return (
        f"Completions wait for their scores ({view.rewards.waiting} groups in the queue)",
        "Give the reward service more: a larger reward.max_batch, more processes, or a faster one.",
    )


def _weights(view: LiveView) -> tuple[str, str]:
    last = view.weights.last_s
    took = f"; the last one took {last:.1f} s" if last is not None else ""
    return (
        f"Everything waits for weight updates{took}",
        f"Raise staleness.bound above {view.staleness.bound}, or choose a faster "
        "weights.transport.",
    )
