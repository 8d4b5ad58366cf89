"""What is wanted of a run in progress, by people or by the autoscaling policy: how many workers,
whether it pauses, whether it stops. The controller asks each second and follows."""

from __future__ import annotations

from collections.abc import Callable

from cluster.runs.control import Wishes


class Steering:
    """Reads the wishes and acknowledges each request once, with an event that carries its id."""

    def __init__(self, wishes: Callable[[], Wishes], event: Callable[..., None]) -> None:
        self._read = wishes
        self._event = event
        self._wishes = Wishes()
        self._told_idle = False
        self._reward_replicas: Callable[[int], None] = lambda count: None

    def on_reward_replicas(self, call: Callable[[int], None]) -> None:
        """``call`` with the number of reward services whenever another one is asked for."""
        self._reward_replicas = call

    def look(self, *, step: int, workers: int, serving: int) -> None:
        """``workers``: serving or starting. Raises nothing for a damaged file."""
        before, self._wishes = self._wishes, self._read()
        now = self._wishes
        if now.request != before.request:
            self._event(
                "control",
                request=now.request,
                step=step,
                workers=workers,
                serving=serving,
                wanted=now.workers,
                paused=now.paused,
                stop=now.stop,
            )
        if now.reward_replicas not in (None, before.reward_replicas):
            assert now.reward_replicas is not None
            self._reward_replicas(now.reward_replicas)
        if before.paused and not now.paused:
            self._told_idle = False
            self._event("unpaused", step=step)

    def rests(self, *, step: int, finished: int) -> None:
        """Called while the run is paused and nothing is under way any more."""
        if not self._told_idle:
            self._told_idle = True
            self._event("paused", step=step, finished_groups=finished)

    @property
    def paused(self) -> bool:
        return self._wishes.paused

    @property
    def stop(self) -> bool:
        return self._wishes.stop

    @property
    def workers(self) -> int | None:
        """How many workers are wanted; None: as many as there are."""
        return self._wishes.worker_count
