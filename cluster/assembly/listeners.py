"""A run's steps, completions and checkpoints handed to the user's callbacks, in the driver."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cluster.contracts.callbacks import STOP, Answer, AnyCallback, Callback, StepInfo
from cluster.contracts.durable import FileDigest
from cluster.contracts.errors import UserError
from cluster.contracts.protocols import Journal
from cluster.contracts.records import RunState
from cluster.contracts.samples import SampleInfo, read_samples, sample_file, sampled_steps


class Listeners:
    """A metrics sink in front of the callbacks.

    After one of them answered STOP or raised, none is called again: ``stopped`` or ``problem`` says
    so, and ``request_stop`` is called once.
    """

    def __init__(
        self,
        callbacks: Sequence[AnyCallback],
        run_dir: Path,
        *,
        steps: int | None,
        first_step: int = 0,
        request_stop: Callable[[], None] = lambda: None,
    ) -> None:
        """``first_step``: steps done before a resume; their completions are not handed out."""
        self._callbacks = [_as_callback(given) for given in callbacks]
        self._run_dir = run_dir
        self._steps = steps
        self._sampled = first_step
        # Files of steps lost at an interrupt, which are done again and then written anew.
        self._stale = {step: _written(run_dir, step) for step in sampled_steps(run_dir)}
        self._request_stop = request_stop
        self._wants_samples = any(_overrides(c, "on_samples") for c in self._callbacks)
        self.stopped = False
        self.problem: BaseException | None = None

    @property
    def wants_samples(self) -> bool:
        return self._wants_samples

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        info = StepInfo(step=step, steps=self._steps, metrics=dict(numbers))
        self._each(lambda callback: callback.on_step(info))
        self._hand_out_samples(before=step)

    def checkpoint(self, path: Path, step: int) -> None:
        self._each(lambda callback: callback.on_checkpoint(path, step))

    def close(self) -> None:
        """At the end: completions that reached the disk after their step."""
        self._hand_out_samples()

    def _hand_out_samples(self, before: int | None = None) -> None:
        """The learner writes beside its work, so the files of some steps may come later."""
        if not self._wants_samples:
            return
        for step in sampled_steps(self._run_dir):
            if step <= self._sampled or (before is not None and step > before):
                continue
            if _written(self._run_dir, step) != self._stale.get(step):
                self._sampled = step
                self._each(partial(_give_samples, read_samples(self._run_dir, step)))

    def _each(self, call: Callable[[Callback], Answer]) -> None:
        for callback in self._callbacks:
            if self.stopped or self.problem is not None:
                return
            try:
                answer = call(callback)
            except BaseException as problem:
                self.problem = problem
                self._request_stop()
                return
            if answer is STOP:
                self.stopped = True
                self._request_stop()
            elif answer is not None:
                self.problem = UserError(
                    f"returned {answer!r}; a callback returns None to go on, or accord.STOP",
                    where=f"callback {type(callback).__name__}",
                )
                self._request_stop()


def _written(run_dir: Path, step: int) -> int:
    return sample_file(run_dir, step).stat().st_mtime_ns


def _give_samples(samples: Sequence[SampleInfo], callback: Callback) -> Answer:
    return callback.on_samples(samples)


class ListenedRun:
    """``Journal`` that also tells the listeners of each checkpoint."""

    def __init__(self, run: Journal, listeners: Listeners) -> None:
        self._run = run
        self._listeners = listeners

    def event(self, kind: str, **detail: Any) -> None:
        self._run.event(kind, **detail)
        if kind == "checkpoint":  # here and not where it is committed, which is another thread
            self._listeners.checkpoint(Path(detail["path"]), detail["step"])

    def account(self, **row: Any) -> None:
        self._run.account(**row)

    async def begin_checkpoint(self, step: int, nbytes: int) -> Path:
        return await self._run.begin_checkpoint(step, nbytes)

    async def commit_checkpoint(
        self, staging: Path, files: Sequence[FileDigest], state: RunState, keep: int
    ) -> Path:
        return await self._run.commit_checkpoint(staging, files, state, keep)

    async def abandon_checkpoint(self, staging: Path) -> None:
        await self._run.abandon_checkpoint(staging)


class _OnStep(Callback):
    """A plain function as a callback."""

    def __init__(self, function: Callable[[StepInfo], Answer]) -> None:
        self._function = function

    def on_step(self, info: StepInfo) -> Answer:
        return self._function(info)


def check_callbacks(callbacks: Sequence[AnyCallback], *, save_rollouts: bool) -> None:
    """Raises UserError for what is no callback, and for one that wants what the run lacks."""
    for given in callbacks:
        if _overrides(_as_callback(given), "on_samples") and not save_rollouts:
            raise UserError(
                "takes completions (on_samples), but logging.save_rollouts is false",
                where=f"callback {type(given).__name__}",
                fix="set logging.save_rollouts = true",
            )


def _as_callback(given: AnyCallback) -> Callback:
    if isinstance(given, Callback):
        return given
    if callable(given) and not isinstance(given, type):
        return _OnStep(given)
    raise UserError(
        f"{given!r} is no callback",
        where="callbacks",
        fix="give a function that takes a StepInfo, or an instance of a class made from "
        "accord.Callback",
    )


def _overrides(callback: Callback, method: str) -> bool:
    return getattr(type(callback), method) is not getattr(Callback, method)
