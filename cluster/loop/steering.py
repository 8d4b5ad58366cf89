"""What is wanted of a run in progress, by people or by the autoscaling policy: how many workers,
whether it pauses, whether it stops. The controller asks each second and follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cluster.loop.autoscale import Autoscaler, Window
from cluster.runs.control import Wishes


class Steering:
    """Reads the wishes and acknowledges each request once, with an event that carries its id.

    ``autoscaler``: chooses the number of workers as long as nobody has asked for one.
    """

    def __init__(
        self,
        wishes: Callable[[], Wishes],
        event: Callable[..., None],
        autoscaler: Autoscaler | None = None,
    ) -> None:
        self._read = wishes
        self._event = event
        self._autoscaler = autoscaler
        self._chosen: int | None = None  # by the policy
        self._wishes = Wishes()
        self._told_idle = False
        self._reward_replicas: Callable[[int], None] | None = None
        self._replicas_told: int | None = None

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
        replicas = now.reward_replicas
        if self._reward_replicas is not None and replicas not in (None, self._replicas_told):
            self._replicas_told = replicas
            assert replicas is not None
            self._reward_replicas(replicas)
        if before.paused and not now.paused:
            self._told_idle = False
            self._event("unpaused", step=step)

    def step_ended(self, numbers: Mapping[str, float], *, now: float, wanted: int) -> None:
        """Lets the policy look at the numbers of a learner step; ``wanted``: workers so far."""
        if self._autoscaler is None or self._wishes.worker_count is not None or self.paused:
            self._chosen = None
            return
        seconds = max(numbers["time/step"], 1e-9)
        window = Window(
            now=now,
            workers=int(numbers["workers/alive"]),
            waited=min(1.0, numbers["time/wait_batch"] / seconds),
            idle=numbers.get("perf/rollout_idle_frac"),
        )
        if (change := self._autoscaler.decide(window, wanted)) is not None:
            self._chosen = change.workers
            self._event("autoscaled", workers=change.workers, before=wanted, why=change.why)

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
        asked = self._wishes.worker_count
        return self._chosen if asked is None else asked
