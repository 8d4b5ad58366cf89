"""How fast a judge is asked, and how much is spent on it. Thread-safe."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from cluster.contracts.config.judge import JudgeConfig
from cluster.contracts.errors import UserError
from reward_service.judge.records import Reply, Spent

WINDOW_S = 60.0
MILLION = 1_000_000


class RateLimit:
    """At most ``requests`` and ``tokens`` in any window of 60 seconds; None: no limit."""

    def __init__(
        self,
        requests: int | None,
        tokens: int | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._requests, self._tokens = requests, tokens
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._sent: deque[list[float]] = deque()  # [when, tokens], oldest first

    def acquire(self, tokens: int) -> list[float]:
        """Waits until a request of about ``tokens`` may be sent; returns its entry, for
        ``correct``. A request above the limit by itself waits until it is alone in the window."""
        while True:
            with self._lock:
                wait_s = self._wait(tokens)
                if wait_s <= 0:
                    entry = [self._clock(), float(tokens)]
                    self._sent.append(entry)
                    return entry
            self._sleep(wait_s)

    def correct(self, entry: list[float], tokens: int) -> None:
        """The request turned out to take ``tokens``."""
        with self._lock:
            entry[1] = float(tokens)

    def _wait(self, tokens: int) -> float:
        now = self._clock()
        while self._sent and self._sent[0][0] <= now - WINDOW_S:
            self._sent.popleft()
        full = self._requests is not None and len(self._sent) >= self._requests
        used = sum(entry[1] for entry in self._sent)
        if self._sent and self._tokens is not None and used + tokens > self._tokens:
            full = True
        return self._sent[0][0] + WINDOW_S - now if full else 0.0


class Budget:
    """Counts what is spent, and refuses a request that could exceed what may be."""

    def __init__(self, config: JudgeConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._reserved = 0.0
        self._spent = Spent()

    @property
    def spent(self) -> Spent:
        with self._lock:
            return self._spent

    def reserve(self, prompt_tokens: int) -> float:
        """The most that a request of about ``prompt_tokens`` may cost; held until ``settle``.
        Raises UserError when that is more than is left."""
        config = self._config
        most = self._cost(prompt_tokens, config.max_tokens)
        with self._lock:
            spent = self._spent
            if config.max_requests is not None and spent.requests >= config.max_requests:
                raise _spent(f"{spent.requests} requests were sent", "max_requests")
            if config.max_cost is not None and (
                spent.cost + self._reserved + most > config.max_cost
            ):
                left = f"{spent.cost:.4f} of {config.max_cost:g} is spent"
                raise _spent(f"{left}, and the next request may cost {most:.4f}", "max_cost")
            self._spent = replace(spent, requests=spent.requests + 1)
            self._reserved += most
        return most

    def settle(self, reserved: float, reply: Reply | None) -> None:
        """What the request took; None: it was not answered."""
        with self._lock:
            self._reserved -= reserved
            if reply is not None:
                self._spent = replace(
                    self._spent,
                    prompt_tokens=self._spent.prompt_tokens + reply.prompt_tokens,
                    completion_tokens=self._spent.completion_tokens + reply.completion_tokens,
                    cost=self._spent.cost
                    + self._cost(reply.prompt_tokens, reply.completion_tokens),
                )

    def from_cache(self) -> None:
        with self._lock:
            self._spent = replace(self._spent, cached=self._spent.cached + 1)

    def _cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        prices = self._config.prompt_price, self._config.completion_price
        return (prompt_tokens * prices[0] + completion_tokens * prices[1]) / MILLION


def _spent(what: str, key: str) -> UserError:
    return UserError(
        f"the judge's budget is spent: {what}",
        where=f"judge.{key}",
        fix=f"raise judge.{key} and run the command again; answers so far come from the cache",
    )
