"""The one thread that touches an engine: it steps, and runs commands between two steps."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TypeVar

from cluster.contracts.errors import AccordError, EngineFailure, Retryable
from cluster.contracts.protocols import Engine
from cluster.contracts.records import Completion

T = TypeVar("T")
LOOK_S = 1.0
IDLE_POLL_S = 0.1  # an idle thread looks so often whether it is to stop


class EngineThread:
    """Builds the engine on its own thread and drives it until ``stop`` or a failure.

    ``on_finished(request_id, completion)`` and ``on_failure(problem)`` are called on that thread
    and must not block. After a failure nothing is stepped again: ``failure`` keeps the cause.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        on_finished: Callable[[str, Completion], None],
        on_failure: Callable[[BaseException], None],
        name: str,
    ) -> None:
        self._make_engine = make_engine
        self._on_finished = on_finished
        self._on_failure = on_failure
        self._commands: queue.SimpleQueue[tuple[Callable[[Engine], object], Future[object]]] = (
            queue.SimpleQueue()
        )
        self._ready: Future[str] = Future()
        self._engine: Engine | None = None
        self._stopping = threading.Event()
        # A daemon: a step that never returns must not keep the process alive after `stop`.
        self._thread = threading.Thread(target=self._run, name=f"{name}-engine", daemon=True)
        self._gate = threading.Lock()  # nothing is queued after the thread stopped listening
        self._open = True
        self.failure: BaseException | None = None
        self.busy_s = 0.0
        self.wait_s = 0.0
        self.generated_tokens = 0  # of finished completions
        self._looked = 0.0
        self.unfinished = 0
        self.gauges: dict[str, float] = {}

    def begin(self) -> None:
        """Start to build the engine; returns at once."""
        self._thread.start()

    def ready(self, timeout_s: float) -> str:
        """Wait until the engine is built; returns its name. Raises what building it raised, and
        Retryable past the deadline."""
        try:
            return self._ready.result(timeout_s)
        except FutureTimeout:
            raise Retryable(f"the engine was not ready within {timeout_s:.0f} s") from None

    def post(self, work: Callable[[Engine], T]) -> Future[T]:
        """Run ``work(engine)`` between two steps; its exception goes into the future only."""
        future: Future[T] = Future()
        with self._gate:
            if not self._open:
                raise self.failure or Retryable("the engine's thread was stopped")
            self._commands.put((work, future))  # type: ignore[arg-type]
        return future

    def call(self, work: Callable[[Engine], T], timeout_s: float, what: str) -> T:
        """``post`` and wait. Raises Retryable when it is not done by the deadline."""
        future = self.post(work)
        try:
            return future.result(timeout_s)
        except FutureTimeout:
            if future.done():  # the work itself raised a TimeoutError
                raise
            raise Retryable(f"the engine did not {what} within {timeout_s:.0f} s") from None

    def beside(self, work: Callable[[Engine], T]) -> T:
        """Run ``work(engine)`` on the caller's thread, while this one steps; the work allows it."""
        with self._gate:
            engine = self._engine
            if not self._open or engine is None:
                raise self.failure or Retryable("the engine's thread was stopped")
        try:
            return work(engine)
        except Exception as problem:
            known = _as_engine_failure("the engine failed", problem)
            if known is problem:
                raise
            raise known from problem

    def break_off(self, problem: BaseException) -> None:
        """Called by work that found the engine unfit: no step follows."""
        problem = _as_engine_failure("the engine failed", problem)
        if self.failure is None:
            self.failure = problem
            self._on_failure(problem)

    def stop(self, timeout_s: float) -> None:
        """End the thread after the step in progress. Raises Retryable when it does not end."""
        self._stopping.set()
        if self._thread.ident is None:
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise Retryable(f"the engine's thread did not end within {timeout_s:.0f} s")

    def _run(self) -> None:
        # Built here, so that one thread alone ever touches it.
        try:
            engine = self._make_engine()
        except BaseException as problem:
            known = _as_engine_failure("the engine could not be built", problem)
            self._close(known)
            self._ready.set_exception(known)
            return
        self._engine = engine
        self._ready.set_result(engine.name)
        try:
            while not self._stopping.is_set() and self.failure is None:
                self._turn(engine)
        except Exception as problem:
            self.break_off(_as_engine_failure(f"{engine.name} failed in a decode step", problem))
        finally:
            self._close(self.failure or Retryable("the engine's thread was stopped"))
            engine.close()

    def _turn(self, engine: Engine) -> None:
        """Everything that was asked meanwhile, then one step (or a short sleep when idle)."""
        self._serve(engine, wait=engine.unfinished == 0)
        if self.failure is not None or engine.unfinished == 0:
            self.unfinished = engine.unfinished
            return
        began = time.perf_counter()
        finished = engine.step()
        ended = time.perf_counter()
        self.busy_s += ended - began
        self.unfinished = engine.unfinished
        # Not at every step, which would cost; but a long completion is to be seen to grow.
        if finished or ended - self._looked > LOOK_S:
            self._looked = ended
            self.gauges = getattr(engine, "counters", dict)()
        for request_id, completion in finished:
            self.generated_tokens += len(completion.token_ids)
            self._on_finished(request_id, completion)

    def _serve(self, engine: Engine, wait: bool) -> None:
        began = time.perf_counter()
        while self.failure is None:
            try:
                work, future = self._commands.get(block=wait, timeout=IDLE_POLL_S if wait else None)
            except queue.Empty:
                break
            finally:
                self.wait_s += time.perf_counter() - began if wait else 0.0
            wait = False
            # Work that fails says so to whoever asked; the engine goes on, unless it was told not
            # to (`break_off`): a refused prompt or update is no reason to stop generating.
            try:
                future.set_result(work(engine))
            except Exception as problem:
                future.set_exception(_as_engine_failure("the engine failed", problem))

    def _close(self, cause: BaseException) -> None:
        with self._gate:
            self._open = False
        while not self._commands.empty():
            _, future = self._commands.get_nowait()
            future.set_exception(cause)


def _as_engine_failure(what: str, problem: BaseException) -> BaseException:
    """An error whose class is known already stays as it is."""
    if isinstance(problem, AccordError) or not isinstance(problem, Exception):
        return problem
    failure = EngineFailure(f"{what}: {type(problem).__name__}: {problem}")
    failure.__cause__ = problem
    return failure
